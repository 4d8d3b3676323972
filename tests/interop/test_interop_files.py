"""Weight files: all kinds of PyTorch's, intact and damaged, and our own."""

import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet_weights
import safetensors.numpy

from lakd_jax import errors, interop

COUNTER, torch_weights = resnet_weights.COUNTER, resnet_weights.torch_weights
assert_same_tree = resnet_weights.assert_same_tree


# PyTorch files


def test_safetensors_file(tmp_path):
    path = tmp_path / "teacher.safetensors"
    parallel = {f"module.{key}": value for key, value in torch_weights().items()}
    counter = {f"module.bn1.{COUNTER}": np.asarray(5)}
    safetensors.numpy.save_file(parallel | counter, path, metadata={"format": "pt"})
    assert_same_tree(interop.load_torch_file(path), torch_weights())
    assert not interop.is_variables_file(path)
    with pytest.raises(errors.TeacherError, match="load_torch_file"):
        interop.load_variables(path)


def test_bfloat16_safetensors_need_no_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for dtype in (np.float16, jnp.bfloat16):
        path = tmp_path / "teacher.safetensors"
        half = {key: value.astype(dtype) for key, value in torch_weights().items()}
        safetensors.numpy.save_file(half, path, metadata={"format": "pt"})
        assert_loaded_as(dtype, path)


def assert_loaded_as(dtype, path):
    """Checks that the file holds `torch_weights()` in `dtype` and loads as float32."""
    loaded = interop.load_torch_file(path)
    assert interop.other_types(loaded) == [jnp.dtype(dtype).name]
    rounded = {k: v.astype(dtype).astype("f4") for k, v in torch_weights().items()}
    variables = interop.from_torch("resnet8", loaded)
    assert_same_tree(variables, interop.from_torch("resnet8", rounded))


# Files that torch wrote


@pytest.fixture
def torch():
    """The torch package; skips the test if it is not installed."""
    return pytest.importorskip("torch")


def tensors(torch, dtype=None):
    given = {k: torch.from_numpy(v.copy()) for k, v in torch_weights().items()}
    return {key: value.to(dtype or value.dtype) for key, value in given.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("ending", [".pth", ".pt", ".th"])
def test_torch_file(torch, tmp_path, zipped, ending):
    path = tmp_path / f"teacher{ending}"
    parallel = {f"module.{key}": value for key, value in tensors(torch).items()}
    parallel[f"module.bn1.{COUNTER}"] = torch.tensor(5)
    content = {"state_dict": parallel, "best_prec1": torch.tensor(91.2), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = interop.load_torch_file(str(path))
    assert all(type(value) is np.ndarray for value in loaded.values())
    assert_same_tree(loaded, torch_weights())
    assert not interop.is_variables_file(path)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_torch_file(torch, tmp_path, name):
    path = tmp_path / "teacher.pth"
    torch.save(tensors(torch, getattr(torch, name)), path)
    assert_loaded_as(jnp.dtype(name), path)


class Harmful:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_torch_refuses(path, *words):
    with pytest.raises(errors.TeacherError) as caught:
        interop.load_torch_file(path)
    message = str(caught.value)
    assert len(message.splitlines()) <= 4
    assert "weights_only" not in message  # torch's advice to allow code
    for word in (str(path), "state_dict()", *words):
        assert word in message
    return message


@pytest.mark.parametrize("how", ["zip", "old", "protocol 2", "protocol 4"])
def test_harmful_file_does_not_run(torch, tmp_path, how):
    path, made = tmp_path / "teacher.pth", tmp_path / "made"
    content = {"state_dict": tensors(torch), "extra": Harmful(made)}
    if how.startswith("protocol"):
        path.write_bytes(pickle.dumps(Harmful(made), protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    assert_torch_refuses(path, "refused because reading it would run code")
    assert not made.exists()
    with open(path, "rb") as file:  # plain pickle does run it
        if how.startswith("protocol"):
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert made.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_is_refused(torch, tmp_path, zipped):
    path = tmp_path / "teacher.pth"
    module = torch.nn.Linear(64, 7)
    torch.save(module, path, _use_new_zipfile_serialization=zipped)
    words = ("would run code", "torch.nn.modules.linear.Linear", "torch.save(model.")
    assert_torch_refuses(path, *words)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_torch_file_cut_short(torch, tmp_path, zipped, share):
    path = tmp_path / "teacher.pth"
    torch.save(tensors(torch), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = assert_torch_refuses(path, "not a readable PyTorch file", "copy it again")
    assert "would run" not in message


def test_other_files_with_a_torch_ending(torch, tmp_path):
    path = tmp_path / "teacher.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    assert_torch_refuses(path, "not a readable PyTorch file")
    path.write_text("<html>404 not found</html>")
    assert_torch_refuses(path, "not a readable PyTorch file")
    torch.save([torch.ones(3)], path)
    assert_torch_refuses(path, "holds a list")


def test_torch_file_of_quantised_weights(torch, tmp_path):
    path = tmp_path / "teacher.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated types
        odd = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    torch.save({"conv1.weight": odd}, path)
    with pytest.raises(errors.TeacherError, match="conv1.weight holds torch.qint8"):
        interop.load_torch_file(path)


def test_only_writing_needs_torch(tmp_path, monkeypatch):
    path = tmp_path / "teacher.pt"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(errors.TeacherError, match="it is empty"):
        interop.load_torch_file(path)
    with pytest.raises(errors.ExportError, match="pip install torch.*safetensors"):
        interop.save_torch_file(path, torch_weights())
    assert path.read_bytes() == b""


def test_unreadable_files(tmp_path):
    with pytest.raises(errors.TeacherError, match="no weights at"):
        interop.load_torch_file(tmp_path / "absent.pth")
    with pytest.raises(errors.TeacherError, match="no weights at"):
        interop.load_variables(tmp_path)
    other = tmp_path / "teacher.h5"
    other.write_bytes(b"")
    with pytest.raises(errors.TeacherError, match="not a readable PyTorch file"):
        interop.load_torch_file(other)


def test_torch_is_never_imported_by_itself():
    code = "import sys; from lakd_jax import interop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_safetensors_cut_short(tmp_path, share):
    path = tmp_path / "teacher.safetensors"
    safetensors.numpy.save_file(torch_weights(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    readers = (interop.load_torch_file, interop.is_variables_file)
    for read in (*readers, interop.load_variables):
        with pytest.raises(errors.TeacherError, match="safetensors is not a readable"):
            read(path)


# Files for users of PyTorch


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".th"])
def test_what_is_saved_is_read_again(tmp_path, ending):
    path = tmp_path / f"student{ending}"
    if ending != ".safetensors":
        torch = pytest.importorskip("torch")
    interop.save_torch_file(path, torch_weights())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert_same_tree(interop.load_torch_file(path), torch_weights())
    if ending == ".safetensors":
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            content = {key: file.get_tensor(key) for key in file.keys()}
    else:
        content = torch.load(path, weights_only=True)
        assert type(content) is dict
    counters = content.keys() - torch_weights().keys()
    norms = [key for key in torch_weights() if key.endswith("running_mean")]
    assert counters == {k.replace("running_mean", COUNTER) for k in norms}
    assert all(str(content[key].dtype).endswith("int64") for key in counters)


def test_other_endings_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="student.h5"):
        interop.save_torch_file(tmp_path / "student.h5", torch_weights())


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
