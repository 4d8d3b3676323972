"""A data set and a config small enough to train many times in a test."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lakd_jax import config as config_lib
from lakd_jax import data, models
from lakd_jax.interop import weights
from lakd_jax.models import chain, vgg
from lakd_jax.runs import single
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir
from lakd_jax.training import evaluate
from lakd_jax.training import spec as spec_lib

CLASSES = ("dark", "left", "right")
# The least that can be cut into three modules; XLA compiles it in half the time of
# resnet8. Runs know it inside `bench` alone.
NETWORK = "small"
SMALL = functools.partial(
    vgg.VGG, stem_widths=(4,), stage_sizes=(1, 1, 1), widths=(4, 6, 8)
)


def split(count: int, seed: int) -> data.Split:
    """Noise of 8x8 whose class is where the light is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), count).astype(np.int32)
    images = rng.integers(0, 80, (count, 8, 8, 3)).astype(np.uint8)
    images[labels == 1, :, :4] += 150
    images[labels == 2, :, 4:] += 150
    return data.Split(images, labels, np.arange(count, dtype=np.int32))


def dataset(train: int = 160, minival: int = 40, test: int = 45) -> data.Dataset:
    return data.Dataset(
        "tiny", CLASSES, split(train, 0), split(minival, 1), split(test, 2)
    )


def config(tmp_path, **fields) -> config_lib.ConfigDict:
    """resnet8 from resnet8 on `dataset`, 40 steps; `fields` with "__" for dots."""
    c = config_lib.default()
    c.update(epochs=4, batch_size=16, eval_batch_size=16, log_every=4)
    c.data.update(source="tiny", pad=1)
    c.student.name = c.teacher.name = "resnet8"
    c.teacher.update(cache=str(tmp_path / "teachers"), epochs=1, floor=0.01)
    c.optim.update(lr=0.05, schedule="cosine", warmup_epochs=1.0)
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    return config_lib.changed(c, changes)


def small(tmp_path, **fields) -> config_lib.ConfigDict:
    """NETWORK from NETWORK on the data of `environment`: 3 epochs of 4 steps."""
    own = {"epochs": 3, "batch_size": 16, "student__name": NETWORK}
    return config(tmp_path, **(own | {"teacher__name": NETWORK} | fields))


COUNTS = {"train": 64, "minival": 32, "test": 45}


@contextlib.contextmanager
def environment(devices: int = 1, **counts):
    """Runs find `dataset`, use that many devices, and know NETWORK.

    An evaluation is of two batches of minival, of three of test, the last one short.
    """
    found = dataset(**(COUNTS | counts))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    with pytest.MonkeyPatch.context() as patch:
        networks = {**models._NETWORKS, NETWORK: SMALL}
        patch.setattr(models, "_NETWORKS", networks)
        patch.setattr(data, "load", lambda *a, **k: found)
        patch.setattr(mesh_lib, "data_mesh", lambda: mesh)
        yield mesh


def variables(model):
    """Weights for `model` drawn by NumPy: XLA compiles random numbers slowly."""
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        fan_in = max(math.prod(leaf.shape[:-1]), 1)
        noise = rng.standard_normal(leaf.shape) * math.sqrt(2 / fan_in)
        return noise.astype(np.float32) if leaf.ndim > 1 else 0 * noise.astype("f4")

    return jax.tree_util.tree_map_with_path(
        draw, chain.variable_shapes(model, model.fixed_side or 8)
    )


def teacher(mesh: Mesh, build=SMALL) -> single.Teacher:
    """A network of random weights, as if it had been trained and tested."""
    model = build(num_classes=len(CLASSES))
    network = weights.Loaded(model, mesh_lib.replicate(variables(model), mesh), "it")
    pixels = spec_lib.Pixels((0.4,) * 3, (0.3,) * 3, jnp.dtype("float32"))
    return single.Teacher(network, pixels, evaluate.Score(15, 45, 1.0), 1)


def quiet():
    """Keyword arguments of what runs a command: nobody stops it, nobody reads it."""
    return {"guard": interrupt.Guard(), "notify": lambda text: None}


def save_student(directory, model, name: str, changed=None, **card):
    """Writes random weights, or `changed`, as a finished run does."""
    directory.mkdir(exist_ok=True)
    network = weights.Loaded(model, None, "", (0.4,) * 3, (0.3,) * 3)
    values, result = changed or variables(model), {"student": name} | card
    weights.save(directory / workdir.STUDENT, values, network, result)
    workdir.write_json(directory / workdir.RESULT, result)
    return directory


class StopAfter(interrupt.Guard):
    """Asks to stop once it has been asked `count` times; installs no handlers."""

    def __init__(self, count: int):
        super().__init__()
        self._left = count

    def check(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise interrupt.Interrupted

    @contextlib.contextmanager
    def released(self):
        yield
