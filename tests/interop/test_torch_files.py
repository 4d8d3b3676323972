"""PyTorch's files, read without torch: all formats and wrappers, and hostile ones."""

import pickle
import struct
import sys

import audit
import ml_dtypes
import numpy as np
import pytest
import resnet_weights
import safetensors.numpy
import torch_files
from torch_files import Call, Name, Reference

import lakd_jax
from lakd_jax import errors, interop
from lakd_jax.config import rules
from lakd_jax.interop import pickles, torch_pickle, torch_tensors, weights

GOLDEN = torch_files.GOLDEN_FILES
ONES = np.ones((2, 3), np.float32)
torch_weights = resnet_weights.torch_weights


# What torch wrote


def test_the_golden_files_are_there():
    assert [file.name for file in GOLDEN] == ["older.pth", "zip.pth"]


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_tensors_of_torch_are_read_to_the_bit(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with audit.without(*audit.CODE):
        loaded = interop.load_torch_file(file)
    torch_files.assert_same_arrays(loaded, torch_files.plain())
    loaded["view"] += 1  # is the caller's


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_what_lies_beside_the_weights(file):
    content = torch_pickle.load(file)
    assert (content["epoch"], content["lr"], content["big"]) == (3, 0.1, 2**70)
    assert content["names"] == ("a", ["b", None, True], b"bytes")
    assert content["best"] == 69.5 and content["best"].dtype == np.float64
    assert content["dtype"].numpy() == np.float32
    assert content["array"].array().tolist() == [0, 1, 2]
    assert content["args"].name == "argparse.Namespace"
    assert content["path"].name == "pathlib.PurePosixPath"


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"_use_new_zipfile_serialization": False},
        {"pickle_protocol": 4},
        {"pickle_protocol": 5, "_use_new_zipfile_serialization": False},
    ],
    ids=str,
)
def test_as_torch_reads(how, tmp_path):
    torch = pytest.importorskip("torch")
    shared = torch.arange(12.0)
    named = torch.nn.Parameter(shared[4:10].view(2, 3))
    named.note = "an attribute"
    content = torch_files.checkpoint(torch)
    content["state_dict"] |= {"shared": shared, "part": shared[2::3], "named": named}
    content["state_dict"]["buffer"] = torch.nn.Buffer(torch.ones(2, 2).t())
    if how.get("_use_new_zipfile_serialization", True):  # torch reads it there only
        content["state_dict"]["unsigned"] = torch.ones(3, dtype=torch.uint16)
    torch.save(content, tmp_path / "file", **how)
    theirs = torch.load(tmp_path / "file", weights_only=False)
    ours = torch_pickle.load(tmp_path / "file")
    assert ours.keys() == theirs.keys()
    assert_same(ours, theirs)


def assert_same(ours, theirs):
    if isinstance(ours, torch_tensors.Tensor):
        assert f"torch.{ours.dtype}" == str(theirs.dtype)
        shown = theirs.detach()
        if ours.dtype == "bfloat16":
            shown = shown.float()
        np.testing.assert_array_equal(ours.array(), shown.numpy())
    elif isinstance(ours, torch_tensors.Array):
        np.testing.assert_array_equal(ours.array(), theirs)
    elif isinstance(ours, torch_tensors.DType):
        assert ours.numpy() == theirs
    elif isinstance(ours, pickles.Placeholder):
        assert ours.name == f"{type(theirs).__module__}.{type(theirs).__qualname__}"
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    else:
        assert ours == theirs


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_reads_what_the_tests_write(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    torch_files.save(tmp_path / "file", {"a": ONES, "epoch": 3}, zipped)
    read = torch.load(tmp_path / "file", weights_only=True)
    assert read["epoch"] == 3 and read["a"].numpy().tolist() == ONES.tolist()


# The content decides


@pytest.mark.parametrize("name", ["a.pth.tar", "A.PTH", "a.bin", "a.safetensors", "a"])
@pytest.mark.parametrize("kind", ["zip", "older", "safetensors", "pickle"])
def test_the_suffix_means_nothing(kind, name, path):
    path = path.with_name(name)
    if kind == "safetensors":
        safetensors.numpy.save_file({"a": ONES}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": ONES}))
    else:
        torch_files.save(path, {"a": ONES}, kind == "zip")
    assert not interop.is_variables_file(path)
    torch_files.assert_same_arrays(interop.load_torch_file(path), {"a": ONES})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>", "download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\0" * 257 + b"ustar", "unpack it"),
        (b"", "it is empty"),
        (b"x" * 99, "neither an archive nor a pickle"),
    ],
)
def test_what_is_mistaken_for_weights(content, words, path):
    path.write_bytes(content)
    with pytest.raises(errors.TeacherError, match=words):
        interop.load_torch_file(path)


# Wrappers


def prefixed(prefix, **more):
    return {prefix + key: value for key, value in torch_weights().items()} | more


OPTIMIZER = {"state": {0: {"momentum_buffer": ONES}}, "param_groups": [{"lr": 0.1}]}
AVERAGES = np.asarray(3)
WRAPPED = {
    "bare": torch_weights(),
    "compiled and parallel": prefixed("_orig_mod.module."),
    "kuangliu": {"net": prefixed("module."), "acc": 95.1, "epoch": 199},
    "tutorial": {"model_state_dict": torch_weights(), "loss": np.asarray(0.4)},
    "optimizer first": {"optimizer": OPTIMIZER, "state_dict": prefixed("module.")},
    "timm": {"state_dict": torch_weights(), "state_dict_ema": prefixed("x.")},
    "averaged": prefixed("module.", n_averaged=AVERAGES),
    "Lightning": {"state_dict": prefixed("model.")},
    "a loss's buffers": {"state_dict": prefixed("model.", **{"loss.weight": ONES[0]})},
    "backbone": {"state_dict": prefixed("backbone.")},
    "student": {"student": torch_weights(), "teacher": prefixed("x.")},
    "no tensors in model": {"model": {"name": "x"}, "net": torch_weights()},
    "twice": {"model": {"state_dict": torch_weights()}},
}


@pytest.mark.parametrize("how", list(WRAPPED))
def test_every_wrapper(how):
    assert_loads(WRAPPED[how], torch_weights())


def assert_loads(content, expected, **options):
    loaded = interop.from_torch("resnet8", content, **options)
    resnet_weights.assert_same_tree(loaded, interop.from_torch("resnet8", expected))


def test_a_head_beside_the_backbone_is_not_left_out():
    weights = prefixed("backbone.", **{"head.weight": ONES})
    with pytest.raises(errors.TeacherError, match="first keys: backbone.conv1.weight"):
        interop.from_torch("resnet8", weights)


def averaged():
    return {key: value + 1 for key, value in torch_weights().items()}


@pytest.mark.parametrize("key", ["state_dict_ema", "teacher", "model.teacher"])
def test_an_entry_is_chosen(key, path):
    content = {"state_dict_ema": {f"module.{k}": v for k, v in averaged().items()}}
    prefix = "model.teacher." if key == "model.teacher" else "teacher."
    both = prefixed("student.") | {prefix + k: v for k, v in averaged().items()}
    torch_files.save(path, content | {"state_dict": both})
    torch_files.assert_same_arrays(interop.load_torch_file(path, key=key), averaged())


def load(file, key, part="teacher"):
    classes = {"num_classes": 7, "dtype": "float32"}
    return weights.load(part, "resnet8", str(file), key=key, **classes)


def test_the_field_that_chooses_an_entry(path):
    torch_files.save(path, {"model": torch_weights(), "model_ema": averaged()})
    bias = [load(path, key).variables for key in ("", "model_ema")]
    kernels = [v["params"]["head"]["dense"]["bias"] for v in bias]
    np.testing.assert_array_equal(kernels[1], kernels[0] + 1)
    with pytest.raises(errors.TeacherError, match="no entry 'ema' .*'model', 'model_e"):
        load(path, "ema")
    interop.save_variables(path, {"params": {}}, {})
    with pytest.raises(errors.TeacherError, match="leave student.init_key empty"):
        load(path, "ema", "student")
    c = lakd_jax.config.default()
    c.teacher.init_key = "ema"
    faults = [rule(c, 1) or "" for _, rule in rules.TABLE]
    assert any("set teacher.init to the file" in fault for fault in faults)


# Errors


def test_nothing_found_names_the_entries(path):
    torch_files.save(path, {"epoch": 1, "generator": {"a": ONES}, "b": 2, "c": 3})
    with pytest.raises(errors.TeacherError) as caught:
        interop.load_torch_file(path)
    assert "'epoch', 'generator', 'b', 'c'" in str(caught.value)
    assert "tensors are in 'generator': name the entry in teacher" in str(caught.value)


def test_a_misfit_shows_the_first_keys_and_the_nearest_network():
    shown = dict(torch_weights("resnet14"))
    del shown["fc.weight"]
    for read in (interop.from_torch, interop.options_from_torch):
        with pytest.raises(errors.TeacherError) as caught:
            read("resnet8", shown)
        first = "conv1.weight, bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var,"
        assert f"first keys: {first} ..." in str(caught.value)
        fits = len(shown) - 1  # all but the head, whose size is not known
        assert f"the nearest is resnet14: {fits} of its {fits + 2}" in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "tensor"])
def test_float8_is_refused_clearly(kind, path):
    name = "F8_E4M3" if kind == "safetensors" else "torch.float8_e4m3fn"
    eight = ONES.astype(ml_dtypes.float8_e4m3fn)
    if kind == "safetensors":
        safetensors.numpy.save_file({"a.weight": eight.view("u1")}, path)
        data = path.read_bytes()
        header = data[8:].replace(b'"U8"', b'"F8_E4M3"')
        (size,) = struct.unpack("<Q", data[:8])
        path.write_bytes(struct.pack("<Q", size + len(header) - len(data) + 8) + header)
    else:
        storage = ("storage", Name("torch.storage", "UntypedStorage"), "0", "cpu", 6)
        hooks = Call(Name("collections", "OrderedDict"), ())
        kind = Name("torch", "float8_e4m3fn")
        arguments = (Reference(storage), 0, (2, 3), (3, 1), False, hooks, kind)
        value = Call(Name("torch._utils", "_rebuild_tensor_v3"), arguments)
        content = torch_files.pickled({"a.weight": value})
        torch_files.archive(path, content, {"0": eight.tobytes()})
    with pytest.raises(errors.TeacherError, match=f"a.weight holds {name}, .*float32"):
        interop.load_torch_file(path)
