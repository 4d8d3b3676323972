"""Tensors and NumPy arrays in a checkpoint; their numbers are read when needed."""

import dataclasses
import functools
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lakd_jax.interop import pickles

_DTYPES = {
    **{f"{k}{bits}": f"{k}{bits}" for k in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{"float16": "float16", "float32": "float32", "float64": "float64"},
    **{"bfloat16": jnp.bfloat16, "bool": "bool"},
    **{"complex64": "complex64", "complex128": "complex128"},
}
_STORAGES = {
    **{"Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32"},
    **{"Long": "int64", "Half": "float16", "Float": "float32", "Double": "float64"},
    **{"BFloat16": "bfloat16", "Bool": "bool", "Untyped": "uint8"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
    **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32"},
    **{"QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"},
}
_MOST_AXES = 32
_MOST_REPEATED = 2**20  # numbers of a tensor that is larger than what is stored of it


@dataclasses.dataclass
class Block:
    """A part of a file.

    Attributes:
        path: the file.
        size: in bytes.
        place: where it starts.
        checksum: its CRC-32; None if the file has none.
    """

    path: pathlib.Path
    size: int
    place: int = 0
    checksum: int | None = None

    @functools.cached_property
    def content(self) -> bytearray:
        """Its bytes; raises ValueError if the file is damaged."""
        content = bytearray(self.size)
        with open(self.path, "rb") as file:
            file.seek(self.place)
            complete = file.readinto(content) == self.size
        if not complete or self.checksum not in (None, zlib.crc32(content)):
            raise ValueError("its checksums differ: it is damaged")
        return content


@dataclasses.dataclass(frozen=True)
class Storage:
    """Numbers in a row: `count` of type `dtype`, from number `start` of a block."""

    block: Block
    dtype: str
    count: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, as PyTorch describes it; `strides` counts numbers.

    `fault` is what it holds if that cannot be read, such as "torch.float8_e4m3fn".
    """

    storage: Storage | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    fault: str = ""

    def array(self) -> np.ndarray:
        """Reads it; raises ValueError if the file is damaged."""
        assert self.storage is not None and not self.fault
        dtype = np.dtype(_DTYPES[self.dtype])
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype)
        return np.ndarray(
            self.shape,
            dtype,
            self.storage.block.content,
            self.storage.start * item_size(self.storage.dtype)
            + self.offset * dtype.itemsize,
            [dtype.itemsize * stride for stride in self.strides],
        )


class DType(pickles.Buildable):
    """A type of numbers of NumPy; `code` is such as "f4", and "" for all others."""

    def __init__(self, code: Any, *_: Any):
        plain = isinstance(code, str) and re.fullmatch(r"[biufc]\d{1,2}", code)
        self.code, self.order = code if plain else "", "="

    def build(self, state: Any) -> None:
        """See `pickles.Buildable`."""
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def numpy(self) -> np.dtype:
        """Returns it as NumPy's."""
        return np.dtype(self.order + self.code)


class Array(pickles.Buildable):
    """A NumPy array that lies in the pickle itself."""

    def __init__(self) -> None:
        self.numbers, self.fault = np.zeros(()), "a NumPy array without numbers"

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape."""
        return self.numbers.shape

    def build(self, state: Any) -> None:
        """See `pickles.Buildable`."""
        _, shape, dtype, fortran, content = state
        if not dtype.code or not isinstance(content, str | bytes | bytearray):
            self.fault = "a NumPy array of objects"
            return
        buffer, order = bytearray(_bytes(content)), "F" if fortran else "C"
        self.numbers = np.ndarray(shape, dtype.numpy(), buffer, order=order)
        self.fault = ""

    def array(self) -> np.ndarray:
        """Returns it in the byte order of this machine."""
        return self.numbers.astype(self.numbers.dtype.newbyteorder("="), copy=False)


def _array(content: Any, dtype: DType, shape: Any, order: str) -> Array:
    """Makes an array as pickles of protocol 5 do."""
    array = Array()
    array.build((1, shape, dtype, order == "F", content))
    return array


def storage_type(name: str) -> str:
    """Returns the dtype of a class of storages, such as "torch.FloatStorage"."""
    module, _, kind = name.rpartition(".")
    if module not in ("torch", "torch.cuda", "torch.storage"):
        raise ValueError(f"{name} is no storage of numbers")
    return _STORAGES[kind.removesuffix("Storage")]


def item_size(dtype: str) -> int:
    """Returns the bytes of a number in a storage."""
    if dtype in _DTYPES:
        return np.dtype(_DTYPES[dtype]).itemsize
    return 4 if dtype == "qint32" else 1


def _faulty(fault: str) -> Tensor:
    return Tensor(None, 0, (), (), "", fault)


def _tensor(
    storage: Storage,
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    *more: Any,
    dtype: str = "",
) -> Tensor:
    """Checks that a tensor lies within its storage."""
    dtype = dtype or storage.dtype
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor has no valid shape")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise ValueError("a tensor has no valid strides")
    if any(isinstance(m, dict) and m for m in more[2:]):
        return _faulty("a conjugated or negated tensor")
    if dtype not in _DTYPES:
        return _faulty(f"torch.{dtype}")
    stored = storage.count * item_size(storage.dtype) // item_size(dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= stored:
        raise ValueError("a tensor is larger than what is stored of it")
    if math.prod(max(n, 1) for n in shape) > max(stored, _MOST_REPEATED):
        return _faulty("a tensor that repeats its numbers")
    return Tensor(storage, offset, tuple(shape), tuple(strides), dtype)


def _tensor_of_type(*arguments: Any) -> Tensor:
    """Rebuilds a tensor of a type that has no storages of its own."""
    dtype = arguments[6].name.removeprefix("torch.")
    return _tensor(*arguments[:6], *arguments[7:], dtype=dtype)


def _subclass(function: Any, kind: Any, arguments: Any, _: Any) -> Any:
    """Rebuilds a tensor with attributes, or of a subclass."""
    plain = (
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
    )
    if kind.name in plain and function.name in CALLS:
        return CALLS[function.name](*arguments)
    return _faulty(f"a {kind.name}")


def _scalar(dtype: DType, content: str | bytes) -> Any:
    if not dtype.code:
        return pickles.Placeholder("numpy.scalar")
    (value,) = np.frombuffer(_bytes(content), dtype.numpy())
    return value


def _bytes(content: str | bytes | bytearray, _: str = "") -> bytes | bytearray:
    """Returns bytes as older pickles keep them, in a text."""
    return content.encode("latin-1") if isinstance(content, str) else content


def _instance(kind: Any, *_: Any) -> pickles.Placeholder:
    return pickles.Placeholder(kind.name)


def _first(value: Any, *_: Any) -> Any:
    return value


def _dictionary(*items: Any) -> dict[str, Any]:
    """Makes a dictionary of text keys, from [(key, value), ...] or nothing."""
    given = items[-1] if items and isinstance(items[-1], list | dict) else []
    pairs = given.items() if isinstance(given, dict) else given
    return {key: value for key, value in pairs if isinstance(key, str)}


# What a checkpoint may call, and what is called instead.
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_qtensor": lambda storage, *_: _faulty(
        f"torch.{storage.dtype}"
    ),
    "torch._utils._rebuild_sparse_tensor": lambda *_: _faulty("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": lambda *_: _faulty("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: _faulty("no numbers"),
    "torch._utils._rebuild_wrapper_subclass": lambda kind, *_: _faulty(
        f"a {kind.name}"
    ),
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": tuple,
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": _dictionary,
    "copyreg._reconstructor": _instance,
    "copyreg.__newobj__": _instance,
    "_codecs.encode": _bytes,
    "builtins.bytes": lambda: b"",  # so are empty ones written
    "numpy.dtype": DType,
    **{
        f"numpy.{core}.multiarray.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("scalar", _scalar),
            ("_reconstruct", lambda *_: Array()),
        )
    },
    "numpy.core.numeric._frombuffer": _array,
    "numpy._core.numeric._frombuffer": _array,
}
