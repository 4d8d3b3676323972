"""Writes PyTorch's files without torch: valid ones, and what no torch would write.

    python tests/support/torch_files.py

writes tests/golden/torch anew, with torch.
"""

import argparse
import collections
import io
import pathlib
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "torch"
GOLDEN_FILES = sorted(GOLDEN.glob("*.pth"))
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long", "i1": "Char"}


class Name(NamedTuple):
    """A class or function by its name."""

    module: str
    name: str


class Call(NamedTuple):
    """The result of calling a name, with a state if one is given."""

    name: Name
    arguments: tuple
    state: Any = None


class Reference(NamedTuple):
    """A persistent id."""

    value: tuple


def assert_same_arrays(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        np.testing.assert_array_equal(value, right[key])


def pickled(value: Any) -> bytes:
    """A pickle of protocol 2 of plain values and the above."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: Any) -> bytes:
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        state = b"" if value.state is None else _pickled(value.state) + b"b"
        return _pickled(value.name) + _pickled(value.arguments) + b"R" + state
    if isinstance(value, Reference):
        return _pickled(value.value) + b"Q"
    if isinstance(value, dict):
        pairs = b"".join(_pickled(k) + _pickled(v) for k, v in value.items())
        return b"}(" + pairs + b"u"
    if isinstance(value, list | tuple):
        items = b"(" + b"".join(map(_pickled, value))
        return items + b"t" if isinstance(value, tuple) else b"]" + items + b"e"
    return pickle.dumps(value, protocol=2)[2:-1]  # plain: neither memo nor frame


def tensor(
    array: np.ndarray,
    key: str,
    *,
    older: bool = False,
    offset: int = 0,
    shape: tuple | None = None,
    strides: tuple | None = None,
    count: int | None = None,
) -> Call:
    """A tensor as torch pickles it; what is given replaces what is right."""
    kind = STORAGES.get(array.dtype.str[1:], "BFloat16")
    count = array.size if count is None else count
    reference = ("storage", Name("torch", f"{kind}Storage"), key, "cpu", count)
    steps = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (
            Reference((*reference, None) if older else reference),
            offset,
            array.shape if shape is None else shape,
            steps if strides is None else strides,
            False,
            Call(Name("collections", "OrderedDict"), ()),
        ),
    )


def archive(
    path: pathlib.Path,
    content: bytes,
    storages: dict[str, bytes],
    compression: int = zipfile.ZIP_STORED,
    **more: bytes,
) -> None:
    """Writes the format since torch 1.6."""
    members = {"data.pkl": content, "byteorder": b"little", "version": b"3\n", **more}
    members |= {f"data/{key}": data for key, data in storages.items()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)


def older(path: pathlib.Path, content: bytes, storages: dict[str, bytes], size=4):
    """Writes the format before torch 1.6; `size` is of every number."""
    parts = [*map(pickled, (MAGIC, VERSION, {})), content, pickled(list(storages))]
    for data in storages.values():
        parts += [struct.pack("<q", len(data) // size), data]
    path.write_bytes(b"".join(parts))


def save(path: pathlib.Path, tree: Any, zipped: bool = True) -> None:
    """Writes a tree of plain values in which every array is a tensor."""
    storages: dict[str, bytes] = {}

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        storages[str(len(storages))] = value.tobytes()
        return tensor(value, str(len(storages) - 1), older=not zipped)

    content = pickled(named(tree))
    (archive if zipped else older)(path, content, storages)


def plain() -> dict[str, np.ndarray]:
    """What the tensors of the golden checkpoints hold."""
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 8 - 1
    return {
        "conv.weight": numbers,
        "view": numbers[1:, :, ::2].transpose(2, 0, 1),
        "parameter": numbers[0].T,
        "half": numbers[0].astype(np.float16),
        "bfloat16": numbers[1].astype(jnp.bfloat16),
        "double": numbers[0].astype(np.float64),
        "count": np.asarray(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def checkpoint(torch: Any) -> dict[str, Any]:
    """A checkpoint of `plain()`, with what people keep beside the weights."""
    numbers = torch.from_numpy(plain()["conv.weight"].copy())
    weights = collections.OrderedDict(
        {
            "conv.weight": numbers,
            "view": numbers[1:, :, ::2].permute(2, 0, 1),
            "parameter": torch.nn.Parameter(numbers[0].t()),
            "half": numbers[0].half(),
            "bfloat16": numbers[1].bfloat16(),
            "double": numbers[0].double(),
            "count": torch.tensor(7),
            "empty": torch.zeros(0, 3),
        }
    )
    weights._metadata = {"": {"version": 1}}
    return {
        "state_dict": weights,
        "args": argparse.Namespace(lr=0.1, milestones=[1, 2]),
        "best": np.float64(69.5),
        "rounded": np.float32(0.5),
        "dtype": np.dtype("f4"),
        "array": np.arange(3),
        "path": pathlib.PurePosixPath("somewhere"),
        "epoch": 3,
        "big": 2**70,
        "lr": 0.1,
        "names": ("a", ["b", None, True], b"bytes"),
        "shape": torch.Size([2, 3]),
    }


if __name__ == "__main__":
    import torch

    GOLDEN.mkdir(exist_ok=True)
    for name, zipped in (("zip.pth", True), ("older.pth", False)):
        buffer = io.BytesIO()
        torch.save(checkpoint(torch), buffer, _use_new_zipfile_serialization=zipped)
        (GOLDEN / name).write_bytes(buffer.getvalue())
