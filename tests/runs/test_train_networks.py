"""Loading a network with its weights from the user's files."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet_weights
import safetensors.numpy
import tiny

from lakd_jax import models
from lakd_jax.config import resolved
from lakd_jax.interop import weights as weights_lib
from lakd_jax.runs import single
from lakd_jax.store import workdir

OPTIONS = {"dtype": "float32", "num_classes": 7}


def torch_file(folder, dtype):
    """Writes PyTorch weights of resnet8 with seven classes as safetensors."""
    path = folder / "teacher.safetensors"
    weights = resnet_weights.torch_weights()
    cast = {key: value.astype(dtype) for key, value in weights.items()}
    safetensors.numpy.save_file(cast, path, metadata={"format": "pt"})
    return path


def student_file(folder, dtype):
    """Writes the weights of the same network as a run does."""
    model = models.create("resnet8", num_classes=7)
    cast = jax.tree.map(lambda x: x.astype(dtype), tiny.variables(model))
    return tiny.save_student(folder, model, "resnet8", cast) / workdir.STUDENT


@pytest.mark.parametrize("write", [torch_file, student_file])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
def test_weights_are_cast_to_float32_with_a_remark(tmp_path, write, dtype):
    path = write(tmp_path, dtype)
    loaded = weights_lib.load("teacher", "resnet8", str(path), **OPTIONS)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded.variables))
    name = jnp.dtype(dtype).name
    remark = "" if dtype == np.float32 else f"{name} weights cast to float32"
    assert loaded.remark == remark


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_the_remark_is_on_the_console(tmp_path, part):
    path = torch_file(tmp_path, np.float16)
    config = resolved.resolve(tiny.config(tmp_path, **{f"{part}__init": str(path)}))
    lines = []
    train = types.SimpleNamespace(shape=(8, 8, 3))
    dataset = types.SimpleNamespace(classes=tuple("abcdefg"), train=train)
    environment = types.SimpleNamespace(
        dataset=dataset, notify=lines.append, folder=pathlib.Path()
    )
    for name in ("teacher", "student"):
        single.load_network(name, config, environment)
    assert lines == [f"{part}.init: {path}: float16 weights cast to float32"]
