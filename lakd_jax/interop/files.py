"""Weight files: PyTorch's, and our own variables as flat safetensors."""

import collections.abc
import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

import flax
import numpy as np
import safetensors
import safetensors.numpy

from lakd_jax import errors, paths
from lakd_jax.interop import state_dict as state_dicts
from lakd_jax.interop import torch_pickle
from lakd_jax.store import bucket, workdir

_FORMAT = "lakd_jax"  # identifies our files, as "pt" does PyTorch's
_DTYPES = frozenset("BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 BF16 F32 F64".split())


def load_torch_file(path: str | os.PathLike, *, key: str = "") -> dict[str, np.ndarray]:
    """Reads a PyTorch state dictionary, unwrapped, with PyTorch's names and layout.

    The content of the file decides how it is read, whatever its name: safetensors, or
    what torch.save writes or wrote before 1.6. Neither needs torch or runs code.
    Values keep their dtype; bfloat16 is that of `jax.numpy`.

    Args:
        path: the file.
        key: the entry to read, such as "state_dict_ema", or a prefix of names, such as
            "teacher"; by default, the usual entry of the trained network.

    Raises:
        errors.ConfigError: `path` is neither a local path nor in a bucket.
        errors.TeacherError: the file does not exist, cannot be read, would run code or
            has no tensors.
    """
    with bucket.local_copy(_existing_file(path)) as file:
        if _is_safetensors(file):
            return state_dicts.plain(_read_safetensors(file)[1], key)
        return state_dicts.plain(torch_pickle.load(file), key)


def save_torch_file(
    path: str | os.PathLike, state_dict: collections.abc.Mapping[str, np.ndarray]
) -> None:
    """Writes a state dictionary, as returned by `to_torch`, for users of PyTorch.

    Every batch norm also gets its counter `num_batches_tracked` (0), so that the keys
    are exactly those of the PyTorch module. The file is written atomically.

    Args:
        path: ends in .safetensors, or in .pt, .pth or .th, which need torch.
        state_dict: key to float32 array.

    Raises:
        errors.ConfigError: `path` is neither a local path nor in a bucket.
        errors.ExportError: torch is needed but not installed.
        ValueError: the suffix is another.
        OSError: the file cannot be written.
    """
    path = paths.place(path, "path")
    tensors = dict(state_dict)
    for key in state_dict:
        if key.endswith(".running_mean"):
            counter = key.removesuffix("running_mean") + "num_batches_tracked"
            tensors[counter] = np.zeros((), np.int64)
    if path.suffix in torch_pickle.SUFFIXES:
        data = torch_pickle.dump(tensors)
    elif path.suffix == ".safetensors":
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    else:
        raise ValueError(f"{path}: {path.suffix!r} is not a suffix of PyTorch files")
    workdir.write_bytes(path, data)


def save_variables(
    path: str | os.PathLike,
    variables: collections.abc.Mapping[str, Any],
    metadata: collections.abc.Mapping[str, Any],
) -> None:
    """Writes a tree of arrays as safetensors with keys like "params/head/dense/bias".

    The file is written atomically.

    Args:
        path: the file to write, in an existing folder.
        variables: nested dictionaries of arrays, in any dtype safetensors supports.
        metadata: JSON-serialisable values (the network's name, options, ...).
    """
    path = paths.place(path, "path")
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {key: np.asarray(value, order="C") for key, value in flat.items()}
    header = {"format": _FORMAT, "metadata": json.dumps(dict(metadata))}
    workdir.write_bytes(path, safetensors.numpy.save(arrays, metadata=header))


def load_variables(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_variables` wrote, bit for bit: returns (variables, metadata).

    Raises errors.TeacherError if the file is missing, damaged or not ours.
    """
    path = _existing_file(path)
    with bucket.local_copy(path) as file:
        header, arrays = _read_safetensors(file)
    if header.get("format") != _FORMAT:
        raise errors.TeacherError(
            f"{path} was not written by lakd_jax; read PyTorch weights with "
            "load_torch_file and from_torch"
        )
    try:
        card = json.loads(header["metadata"])
        if not isinstance(card, dict):
            raise ValueError(f"its metadata is a {type(card).__name__}")
        return flax.traverse_util.unflatten_dict(arrays, sep="/"), card
    except (KeyError, ValueError, TypeError) as error:
        raise errors.TeacherError(
            f"{path}: its metadata cannot be read ({error}); copy it again"
        ) from error


def is_variables_file(path: str | os.PathLike) -> bool:
    """Returns whether `load_variables`, rather than `load_torch_file`, reads this file.

    Raises errors.TeacherError if it is missing, or a .safetensors file is not valid.
    """
    with bucket.local_copy(_existing_file(path)) as copy:
        if not _is_safetensors(copy):
            return False
        with _open_safetensors(copy) as file:
            return (file.metadata() or {}).get("format") == _FORMAT


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing_file(path: str | os.PathLike) -> pathlib.Path:
    path = paths.place(path, "path")
    if not path.is_file():
        raise errors.TeacherError(f"no weights at {path}; check the path")
    return path


def _is_safetensors(path: pathlib.Path) -> bool:
    """Returns whether a file begins as safetensors do: a length, and JSON.

    A .safetensors file that begins as no other weights is a damaged one.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise errors.TeacherError(f"{path} cannot be read ({error})") from error
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and start[:1] not in (b"P", b"\x80")


def _read_safetensors(
    path: pathlib.Path,
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with _open_safetensors(path) as file:
        for key in file.keys():
            dtype = file.get_slice(key).get_dtype()
            if dtype not in _DTYPES:
                raise errors.TeacherError(
                    f"{path}: {key} holds {dtype}, which is not read; save the weights "
                    "as float32, float16 or bfloat16"
                )
        header = file.metadata() or {}
        return header, {key: file.get_tensor(key) for key in file.keys()}


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> collections.abc.Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.TeacherError(
            f"{path} is not a readable safetensors file ({error}); copy it again"
        ) from error
