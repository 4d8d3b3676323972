"""Files of transformers: names of two libraries, patches, sizes."""

import functools

import numpy as np
import pytest
import tiny

from lakd_jax import errors, interop, models
from lakd_jax.interop import weights
from lakd_jax.models import vit

NAME = "small_vit"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Returns a small network for 12x12 images, which is known as NAME."""
    build = functools.partial(vit.ViT, width=64, stage_sizes=(1, 1, 1, 1))
    monkeypatch.setitem(models._NETWORKS, NAME, build)
    return models.create(NAME, num_classes=3, patch=3, image_size=12, layer_scale=0.1)


def test_torchvisions_names_go_there_and_back(small):
    """Its network has no layer scale; its first files named the MLP's layers."""
    plain = small.clone(layer_scale=0.0)
    variables = tiny.variables(plain)
    state = interop.to_torch(NAME, variables, "torchvision")
    first = "encoder.layers.encoder_layer_0."
    assert {k.removeprefix(first) for k in state if k.startswith(first)} == {
        *(f"{n}.{w}" for n in ("ln_1", "ln_2") for w in ("weight", "bias")),
        *(f"mlp.{n}.{w}" for n in (0, 3) for w in ("weight", "bias")),
        *(f"self_attention.in_proj_{w}" for w in ("weight", "bias")),
        *(f"self_attention.out_proj.{w}" for w in ("weight", "bias")),
    }
    assert {k for k in state if not k.startswith("encoder.layers.")} == {
        *("class_token", "encoder.pos_embedding"),
        *(f"{n}.{w}" for n in ("conv_proj", "encoder.ln") for w in ("weight", "bias")),
        *(f"heads.head.{w}" for w in ("weight", "bias")),
    }
    old = {
        k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v
        for k, v in state.items()
    }
    for names in (state, old, interop.to_torch(NAME, variables, "timm")):
        again = interop.from_torch(NAME, names)
        for leaf, expected in zip(*map(leaves, (again, variables)), strict=True):
            np.testing.assert_array_equal(leaf, expected)


def leaves(tree):
    return (
        [tree]
        if not isinstance(tree, dict)
        else sum((leaves(tree[k]) for k in sorted(tree)), [])
    )


def test_patch_size_and_layer_scale_are_read_from_the_arrays(small):
    state = interop.to_torch(NAME, tiny.variables(small))
    found = interop.options_from_torch(NAME, state)
    wanted = {"num_classes": 3, "patch": 3, "image_size": 12, "layer_scale": 1.0}
    assert found == wanted
    state["pos_embed"] = state["pos_embed"][:, :-1]
    with pytest.raises(errors.TeacherError, match="no usable 'pos_embed'"):
        interop.options_from_torch(NAME, state)


def saved(small, folder):
    file = folder / "weights.safetensors"
    interop.save_torch_file(file, interop.to_torch(NAME, tiny.variables(small)))
    return str(file)


def load(file, field="teacher", **given):
    given = {"dtype": "float32", "num_classes": 3} | given
    return weights.load(field, NAME, file, **given)


def test_a_file_for_another_size_is_interpolated_and_says_so(small, tmp_path):
    file = saved(small, tmp_path)
    same, other = load(file, data_size=12), load(file, data_size=24)
    assert same.remark == "" and same.model.image_size == 12
    assert other.remark == (
        "position embeddings interpolated from images of 12x12 to 24x24"
    )
    assert other.model.image_size == 24
    assert other.variables["params"]["stem"]["pos_embed"].shape == (1, 65, 64)
    assert other.digest == same.digest  # of the file
    assert load(file, image_size=12, data_size=24).remark == ""
    with pytest.raises(
        errors.TeacherError, match="of 32x32: patch is 3, .* such as 33"
    ):
        load(file, data_size=32)


def test_a_teacher_from_a_run_keeps_the_size_of_its_run(small, tmp_path):
    """A student starts at the size of the data."""
    variables = tiny.variables(small)
    network = weights.Loaded(small, None, "", (0.4,) * 3, (0.3,) * 3, 12)
    file = tmp_path / "student.safetensors"
    weights.save(file, variables, network, {"student": NAME})
    teacher = load(str(file), data_size=24)
    assert teacher.model.image_size == 12 and teacher.remark == ""
    student = load(str(file), "student", data_size=24)
    assert student.model.image_size == 24 and "interpolated" in student.remark


def test_options_without_arrays_are_the_configs(small, tmp_path):
    options = {"drop_path": 0.2, "dropout": 0.1, "patch": 2, "layer_scale": 0.5}
    found = load(saved(small, tmp_path), options=options, data_size=12).model
    assert (found.drop_path, found.dropout, found.patch) == (0.2, 0.1, 3)


def test_random_weights_are_for_the_data(small):
    options = {"patch": 4, "drop_path": 0.2}
    found = load("", options=options, data_size=32).model
    assert (found.image_size, found.patch, found.drop_path) == (32, 4, 0.2)
    with pytest.raises(errors.ConfigError, match="student.patch is 4, which does not"):
        load("", "student", options=options, data_size=18)
