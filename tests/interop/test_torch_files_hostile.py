"""Files that are no weights but code, damaged or hostile: errors in a few lines."""

import functools
import zipfile

import audit
import numpy as np
import pytest
import resnet_weights
import torch_files
from torch_files import Call, Name

from lakd_jax import errors, interop
from lakd_jax.interop import pickles

GOLDEN = torch_files.GOLDEN_FILES
ONES = np.ones((2, 3), np.float32)
torch_weights = resnet_weights.torch_weights


# Code


def assert_refused(path, *words):
    with audit.without(*audit.CODE), pytest.raises(errors.TeacherError) as caught:
        interop.load_torch_file(path)
    for word in ("would run code", "save(model.state_dict(), FILE)", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.eval", "__builtin__.getattr", "runpy.run_path"]
)
def test_functions_that_run_code_are_refused_by_name(name, zipped, path):
    harm = Call(Name(*name.split(".")), ("1",))
    torch_files.save(path, {"state_dict": {"a": ONES}, "more": [harm]}, zipped)
    assert_refused(path, f"it calls {name.replace('__builtin__', 'builtins')}")


def test_unknown_objects_beside_the_weights_are_inert(path):
    options = Call(Name("omegaconf.dictconfig", "DictConfig"), (), {"a": 1})
    torch_files.save(path, {"state_dict": {"a": ONES}, "config": options, "b": 1})
    with audit.without(*audit.CODE):
        torch_files.assert_same_arrays(interop.load_torch_file(path), {"a": ONES})


def test_a_pickled_module_is_refused_with_what_to_do(path):
    module = Call(Name("__main__", "Net"), (), {"_parameters": {"weight": ONES}})
    path.write_bytes(torch_files.pickled({"model": module, "epoch": 3}))
    words = "'model' is a pickled __main__.Net, .* save model.state_dict"
    with pytest.raises(errors.TeacherError, match=words):
        interop.load_torch_file(path)
    torch_files.archive(path, torch_files.pickled(module), {})
    assert_refused(path, "it is a pickled __main__.Net")
    torch_files.archive(path, b"", {}, **{"constants.pkl": b""})
    assert_refused(path, "it is a TorchScript program")


# Damaged and hostile files


def archive(path, value=None, storages=None, **options):
    value = torch_files.tensor(ONES, "0") if value is None else value
    storages = {"0": ONES.tobytes()} if storages is None else storages
    content = torch_files.pickled({"a": value})
    torch_files.archive(path, content, storages, **options)


def tensor(path, **changes):
    archive(path, torch_files.tensor(ONES, changes.pop("key", "0"), **changes))


def raw(path, *, content):
    path.write_bytes(b"\x80\x02" + content)


def overlapping(path):
    """Many members of an archive that are the same bytes: an archive that grows."""
    big, count = np.zeros(2**16, np.float32), 50
    value = {str(k): torch_files.tensor(big, str(k)) for k in range(count)}
    archive(path, value, {"0": big.tobytes()})
    with zipfile.ZipFile(path, "a") as file:
        (only,) = (m for m in file.infolist() if m.filename.endswith("data/0"))
        for k in range(1, count):
            member = zipfile.ZipInfo(f"archive/data/{k}")
            member.header_offset, member.CRC = only.header_offset, only.CRC
            member.file_size = member.compress_size = only.file_size
            file.filelist.append(member)
        file._didModify = True


def flipped(path):
    archive(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(ONES.tobytes(), ONES.tobytes()[:-1] + b"\0"))


def lacking(path):
    value = torch_files.pickled({"a": torch_files.tensor(ONES, "0", older=True)})
    torch_files.older(path, value, {})


def looped(path):
    """{"model": itself}: every wrapper leads to another one."""
    raw(path, content=b"}q\0(X\5\0\0\0modelh\0X\3\0\0\0neth\0u.")


DOUBLED = b")" + b"2\x86" * 60  # 2**60 tuples, in 60 steps
HOSTILE = {
    "a bomb": (functools.partial(archive, compression=zipfile.ZIP_DEFLATED), "compres"),
    "overlapping members": (overlapping, "larger than the file"),
    "a key outside": (functools.partial(tensor, key="../../etc"), "not in the archive"),
    "a larger storage": (functools.partial(tensor, count=9), "24 bytes instead of 36"),
    "an enormous storage": (functools.partial(tensor, count=2**40), "larger than the"),
    "a negative storage": (functools.partial(tensor, count=-1), "no valid size"),
    "a larger tensor": (functools.partial(tensor, shape=(3, 3)), "larger than what"),
    "a later tensor": (functools.partial(tensor, offset=1), "larger than what is"),
    "negative strides": (functools.partial(tensor, strides=(-3, 1)), "no valid shape"),
    "missing strides": (functools.partial(tensor, strides=(3,)), "no valid strides"),
    "one number for all": (
        functools.partial(tensor, shape=(2**30, 2**30), strides=(0, 0)),
        "repeats its numbers",
    ),
    "a flipped bit": (flipped, "damaged"),
    "two pickles": (
        functools.partial(archive, **{"more/data.pkl": b""}),
        "without a data.pkl",
    ),
    "other bytes": (functools.partial(archive, byteorder=b"big"), "byte order"),
    "a storage left out": (lacking, "storages that it does not hold"),
    "a wrapper of itself": (looped, "no tensors found"),
    "a key that takes ages": (
        functools.partial(raw, content=b"}" + DOUBLED + b"Ns."),
        "no tensors found",
    ),
    "a storage that takes ages": (
        functools.partial(raw, content=b"(X\7\0\0\0storageN" + DOUBLED + b"NK\1tQ."),
        "no storage",
    ),
    "a large memo": (
        functools.partial(raw, content=b"}r\xff\xff\xff\xff."),
        "no tensors found",
    ),
    "a long text": (
        functools.partial(raw, content=b"X\xff\xff\xff\x7fabc."),
        "too early",
    ),
    "a long number": (
        functools.partial(raw, content=b"\x8b\xff\xff\xff\x7fabc."),
        "too early",
    ),
    "an extension": (functools.partial(raw, content=b"\x82\1."), "EXT1"),
    "no objects": (functools.partial(raw, content=b"0."), "not a readable"),
    "large numbers": (
        functools.partial(
            raw,
            content=torch_files.pickled(
                Call(Name("numpy.core.multiarray", "scalar"), (1, b"x"))
            )[2:],
        ),
        "not a readable",
    ),
}


@pytest.mark.parametrize("how", list(HOSTILE))
def test_a_hostile_file_is_an_error_in_a_few_lines(how, path):
    write, words = HOSTILE[how]
    write(path)
    with audit.without(*audit.CODE), pytest.raises(errors.TeacherError) as caught:
        interop.load_torch_file(path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 700


def test_too_many_steps(path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_STEPS", 9)
    raw(path, content=b"}" + b"N0" * 10 + b".")
    with pytest.raises(errors.TeacherError, match="more than 9 steps"):
        interop.load_torch_file(path)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_file_cut_anywhere_is_an_error(file, path):
    data = file.read_bytes()
    for end in range(0, len(data), 97):
        path.write_bytes(data[:end])
        with pytest.raises(errors.TeacherError, match="not a readable PyTorch file"):
            interop.load_torch_file(path)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_changed_byte_is_an_error_or_harmless(file, path):
    data, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    refused = 0
    with audit.without(*audit.CODE):
        for _ in range(200):
            place = int(rng.integers(len(data)))
            changed = data.copy()
            changed[place] ^= int(rng.integers(1, 256))
            path.write_bytes(changed)
            try:
                interop.load_torch_file(path)
            except errors.TeacherError:  # any other exception fails the test
                refused += 1
    assert 0 < refused < 200
