"""Weights in and out: PyTorch state dictionaries and our own files."""

import functools
import subprocess
import sys
import types

import flax
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lakd_jax import errors, interop, models

COUNTER = "num_batches_tracked"


@functools.cache
def torch_weights(name="resnet8", shortcut="projection", classes=7):
    """A made-up state_dict of any registered ResNet, from the published layout."""
    widths = (32, 64, 128, 256) if name.endswith("x4") else (16, 16, 32, 64)
    size = (int(name.removeprefix("resnet").removesuffix("x4")) - 2) // 6
    shapes = {"conv1.weight": (widths[0], 3, 3, 3)} | norm("bn1", widths[0])
    for stage in (1, 2, 3):
        for index in range(size):
            block = f"layer{stage}.{index}"
            old, new = widths[stage - (index == 0)], widths[stage]
            shapes[f"{block}.conv1.weight"] = (new, old, 3, 3)
            shapes[f"{block}.conv2.weight"] = (new, new, 3, 3)
            shapes |= norm(f"{block}.bn1", new) | norm(f"{block}.bn2", new)
            if old != new and shortcut == "projection":
                shapes[f"{block}.downsample.0.weight"] = (new, old, 1, 1)
                shapes |= norm(f"{block}.downsample.1", new)
    shapes |= {"fc.weight": (classes, widths[3]), "fc.bias": (classes,)}
    return {key: golden_weights.tensor(key, shape) for key, shape in shapes.items()}


def norm(prefix, width):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{part}": (width,) for part in parts}


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# from_torch


@pytest.mark.parametrize("shortcut", ["projection", "identity"])
@pytest.mark.parametrize("name", models.names())
def test_every_network_takes_its_state_dict(name, shortcut):
    weights = torch_weights(name, shortcut)
    options = interop.options_from_torch(name, weights)
    assert options == {"num_classes": 7, "shortcut": shortcut}
    variables = interop.from_torch(name, weights)
    model = models.create(name, **options)
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False),
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 3)),
    )
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    leaves = flax.traverse_util.flatten_dict(variables).values()
    # Every number arrives exactly once.
    ours = np.sort(np.concatenate([leaf.ravel() for leaf in leaves]))
    theirs = np.sort(np.concatenate([value.ravel() for value in weights.values()]))
    np.testing.assert_array_equal(ours, theirs)


def test_layout_and_places():
    weights = torch_weights()
    variables = interop.from_torch("resnet8", weights)
    block = variables["params"]["stage2"]["block1"]
    np.testing.assert_array_equal(
        block["conv1"]["kernel"][2, 1, 5, 9],
        weights["layer2.0.conv1.weight"][9, 5, 2, 1],
    )
    np.testing.assert_array_equal(
        block["shortcut_bn"]["scale"], weights["layer2.0.downsample.1.weight"]
    )
    np.testing.assert_array_equal(
        variables["batch_stats"]["stem"]["bn"]["var"], weights["bn1.running_var"]
    )
    np.testing.assert_array_equal(
        variables["params"]["head"]["dense"]["kernel"], weights["fc.weight"].T
    )


def test_dtype_of_the_result():
    half = {key: value.astype(np.float16) for key, value in torch_weights().items()}
    for leaf in jax.tree.leaves(interop.from_torch("resnet8", half)):
        assert leaf.dtype == np.float32
    for leaf in jax.tree.leaves(
        interop.from_torch("resnet8", torch_weights(), dtype=jnp.bfloat16)
    ):
        assert leaf.dtype == jnp.bfloat16


class FakeTensor:
    """What we use of a torch tensor; NumPy refuses its bfloat16 as torch does."""

    def __init__(self, array, dtype="torch.bfloat16"):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def detach(self):
        return self

    cpu = detach

    def float(self):
        return FakeTensor(self.array, "torch.float32")

    def numpy(self):
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array


def wrapped():
    bare = torch_weights()
    counters = {f"bn1.{COUNTER}": np.asarray(5)}
    parallel = {f"module.{key}": value for key, value in bare.items()}
    linear = {key.replace("fc.", "linear."): value for key, value in bare.items()}
    shortcut = {
        key.replace(".downsample.", ".shortcut."): v for key, v in linear.items()
    }
    return {
        "bare": bare,
        "counters": bare | counters,
        "state_dict": {"state_dict": parallel, "best_prec1": 91.2, "epoch": 3},
        "model": {"epoch": 240, "model": bare, "accuracy": np.float32(0.7)},
        "net": {"net": {f"module.{key}": v for key, v in linear.items()}, "acc": 1},
        "nested": {"state_dict": {"model": bare}},
        "prefixes": {f"model.module.{key}": value for key, value in bare.items()},
        "shortcut": shortcut,
        "tensors": {key: FakeTensor(value) for key, value in bare.items()},
    }


@pytest.mark.parametrize("how", list(wrapped()))
def test_wrapped_state_dicts(how):
    variables = interop.from_torch("resnet8", wrapped()[how])
    assert_same_tree(variables, interop.from_torch("resnet8", torch_weights()))


def misfit(name, weights):
    with pytest.raises(errors.TeacherError) as caught:
        interop.from_torch(name, weights)
    message = str(caught.value)
    assert len(message.splitlines()) <= 10
    assert name in message
    return message


def test_missing_key_is_named():
    weights = dict(torch_weights())
    del weights["layer3.0.conv2.weight"]
    assert "1 missing: layer3.0.conv2.weight" in misfit("resnet8", weights)


def test_surplus_key_is_named_as_it_is_spelled_in_the_file():
    weights = {"module." + key: value for key, value in torch_weights().items()}
    weights["module.linear.weight"] = weights["module.fc.weight"]
    assert "1 surplus: linear.weight" in misfit("resnet8", weights)


def test_wrongly_shaped_key_is_named_with_both_shapes():
    weights = torch_weights() | {"layer1.0.bn1.bias": np.zeros(17, np.float32)}
    message = misfit("resnet8", weights)
    assert "1 of another shape: layer1.0.bn1.bias (17,) instead of (16,)" in message


def test_another_network_is_suggested_and_at_most_ten_keys_listed():
    message = misfit("resnet8", torch_weights("resnet14"))
    assert "they fit resnet14: " in message
    assert message.count("layer") == 10
    assert "and 20 more" in message  # three blocks of ten tensors
    message = misfit("resnet14", torch_weights("resnet8x4"))
    assert "they fit resnet8x4: " in message
    assert message.count("layer") + message.count("bn1.") >= 3


def test_partly_missing_projections_are_no_identity_shortcut():
    weights = {
        key: value
        for key, value in torch_weights().items()
        if not key.startswith("layer2.0.downsample")
    }
    message = misfit("resnet8", weights)
    assert "5 missing" in message
    assert "no registered network fits" in message


@pytest.mark.parametrize("shape", [None, (), (7,), (0, 64)])
def test_class_count_must_be_readable(shape):
    weights = dict(torch_weights())
    del weights["fc.weight"]
    if shape is not None:
        weights["fc.weight"] = np.zeros(shape, np.float32)
    assert "fc.weight" in misfit("resnet8", weights)
    with pytest.raises(errors.TeacherError, match="fc.weight"):
        interop.options_from_torch("resnet8", weights)


def test_weights_must_be_finite():
    bad = torch_weights()["bn1.bias"].copy()
    bad[3] = np.nan
    message = misfit("resnet8", torch_weights() | {"bn1.bias": bad})
    assert "bn1.bias" in message
    assert "NaN" in message


def test_nothing_to_read():
    with pytest.raises(errors.TeacherError, match="no tensors found"):
        interop.from_torch("resnet8", {"epoch": 3})
    with pytest.raises(ValueError, match="did you mean 'resnet8'"):
        interop.from_torch("resnet9", torch_weights())


# PyTorch files


def test_safetensors_file(tmp_path):
    path = tmp_path / "teacher.safetensors"
    parallel = {f"module.{key}": value for key, value in torch_weights().items()}
    counter = {f"module.bn1.{COUNTER}": np.asarray(5)}
    safetensors.numpy.save_file(parallel | counter, path, metadata={"format": "pt"})
    loaded = interop.load_torch_file(path)
    assert loaded.keys() == torch_weights().keys()
    for key, value in loaded.items():
        np.testing.assert_array_equal(value, torch_weights()[key])
    assert not interop.is_variables_file(path)
    with pytest.raises(errors.TeacherError, match="load_torch_file"):
        interop.load_variables(path)


def test_torch_file_is_read_as_weights_only(tmp_path, monkeypatch):
    path = tmp_path / "teacher.th"
    path.write_bytes(b"anything")

    def load(given, *, map_location, weights_only):
        assert (given, map_location, weights_only) == (path, "cpu", True)
        tensors = {f"module.{k}": FakeTensor(v) for k, v in torch_weights().items()}
        return {"state_dict": tensors, "best_prec1": 91.2}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    loaded = interop.load_torch_file(str(path))
    assert loaded.keys() == torch_weights().keys()
    assert all(type(value) is np.ndarray for value in loaded.values())
    assert not interop.is_variables_file(path)


def test_torch_file_that_torch_refuses(tmp_path, monkeypatch):
    path = tmp_path / "teacher.pth"
    path.write_bytes(b"")

    def refuse(given, **options):
        raise EOFError

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=refuse))
    with pytest.raises(errors.TeacherError, match="teacher.pth.*EOFError"):
        interop.load_torch_file(path)
    whole_module = types.SimpleNamespace(load=lambda given, **options: [1])
    monkeypatch.setitem(sys.modules, "torch", whole_module)
    with pytest.raises(errors.TeacherError, match="holds a list"):
        interop.load_torch_file(path)


def test_torch_missing(tmp_path, monkeypatch):
    path = tmp_path / "teacher.pt"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(errors.TeacherError, match="pip install torch"):
        interop.load_torch_file(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(errors.TeacherError, match="no weights at"):
        interop.load_torch_file(tmp_path / "absent.pth")
    with pytest.raises(errors.TeacherError, match="no weights at"):
        interop.load_variables(tmp_path)
    other = tmp_path / "teacher.h5"
    other.write_bytes(b"")
    with pytest.raises(errors.TeacherError, match="unknown ending '.h5'"):
        interop.load_torch_file(other)
    broken = tmp_path / "teacher.safetensors"
    broken.write_bytes(b"no safetensors at all")
    for read in (interop.load_torch_file, interop.load_variables):
        with pytest.raises(errors.TeacherError, match="no readable safetensors"):
            read(broken)


def test_torch_is_never_imported_by_itself():
    code = "import sys; from lakd_jax import interop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Our own files


def test_variables_survive_to_the_bit(tmp_path):
    noise = np.random.default_rng(0).standard_normal((3, 4))
    variables = {
        "params": {
            "stage1": {"block1": {"kernel": jnp.asarray(noise, jnp.float32)}},
            "head": {"kernel": noise.astype(np.float32).T, "scalar": np.float32(-0.0)},
            "half": jnp.asarray(noise, jnp.bfloat16),
        },
        "batch_stats": {"odd": np.asarray([np.nan, np.inf, 1e-42], np.float32)},
        "counts": {"steps": np.asarray(7, np.int32)},
    }
    metadata = {"name": "resnet8", "num_classes": 5, "mean": [0.5, 0.4, 0.1]}
    path = tmp_path / "student.safetensors"
    interop.save_variables(path, variables, metadata)
    loaded, information = interop.load_variables(path)
    assert information == metadata
    assert interop.is_variables_file(path)
    assert_same_tree(loaded, jax.tree.map(np.asarray, variables))
    assert np.signbit(loaded["params"]["head"]["scalar"])
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]


def test_a_saved_network_gives_the_same_logits(tmp_path):
    model = models.create("resnet8", num_classes=7)
    variables = interop.from_torch("resnet8", torch_weights())
    interop.save_variables(tmp_path / "net.safetensors", variables, {})
    loaded, _ = interop.load_variables(tmp_path / "net.safetensors")
    images = jnp.ones((1, 8, 8, 3))
    apply = jax.jit(functools.partial(model.apply, train=False))
    np.testing.assert_array_equal(
        apply(loaded, images).logits, apply(variables, images).logits
    )


def test_a_damaged_variables_file_is_reported(tmp_path):
    path = tmp_path / "student.safetensors"
    interop.save_variables(path, {"params": {"a": np.ones(100)}}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(errors.TeacherError, match="student.safetensors"):
        interop.load_variables(path)
