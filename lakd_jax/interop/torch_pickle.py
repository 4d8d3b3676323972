"""Reads and writes PyTorch's files (.pt, .pth, ...); reading them needs no torch.

A file is a zip archive, with a pickle and one member per storage, or a sequence of
pickles and storages, as torch wrote before 1.6. No code in a file can run, see
`pickles`.
"""

import collections.abc
import io
import pathlib
import struct
import zipfile
from typing import Any, BinaryIO

import numpy as np

from lakd_jax import errors
from lakd_jax.interop import pickles, torch_tensors

SUFFIXES = (".pt", ".pth", ".th")  # that are written

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of an older file
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of an archive
# What people mistake for weights: the first bytes, what it is, what to do.
_MISTAKEN = (
    (b"<", "it is a web page: download the file itself"),
    (b"version https://git-lfs", "it is a pointer of Git LFS: run git lfs pull"),
    (b"\x1f\x8b", "it is compressed by gzip: decompress it"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes"),
)


def load(path: pathlib.Path) -> collections.abc.Mapping[str, Any]:
    """Returns the dictionary in a file; its tensors are `torch_tensors.Tensor`.

    Objects that are no part of the weights, such as an argparse.Namespace, become
    `pickles.Placeholder`.

    Raises:
        errors.TeacherError: the file cannot be read, would run code or holds no
            dictionary.
    """
    try:
        content = _content(path)
    except pickles.Refusal as error:
        raise errors.TeacherError(_refusal(path, str(error))) from error
    except Exception as error:  # a damaged pickle fails in every way
        raise errors.TeacherError(_unreadable(path, error)) from error
    if isinstance(content, pickles.Placeholder):
        raise errors.TeacherError(_refusal(path, f"it is a pickled {content.name}"))
    if not isinstance(content, collections.abc.Mapping):
        raise errors.TeacherError(
            f"{path} holds a {type(content).__name__}, not a state_dict; save "
            "model.state_dict() instead"
        )
    return content


def dump(tensors: collections.abc.Mapping[str, np.ndarray]) -> bytes:
    """Serialises tensors as a PyTorch file; raises errors.ExportError without torch."""
    try:
        import torch  # optional, and slow to import
    except ImportError as error:
        raise errors.ExportError(
            "writing a PyTorch file needs torch, which is not installed: pip install "
            "torch, or export safetensors, which users of PyTorch can read too"
        ) from error
    content = {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class _Storages:
    """The storages that the pickle of a file refers to, by their keys."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.blocks: dict[str, torch_tensors.Block] = {}

    def refer(self, reference: Any) -> Any:
        """Returns what a persistent id stands for: a storage, or a pickled class."""
        if reference[0] == "module":
            return reference[1]
        what, kind, key, _, count, *view = reference
        if what != "storage" or type(key) is not str or type(count) is not int:
            raise ValueError("it refers to what is no storage")
        if not 0 <= count < 2**48:
            raise ValueError(f"storage {key!r} has no valid size")
        dtype = torch_tensors.storage_type(kind.name)
        size = count * torch_tensors.item_size(dtype)
        block = self.blocks.setdefault(key, torch_tensors.Block(self.path, size))
        if block.size != size:
            raise ValueError(f"storage {key!r} has two sizes")
        if not view or view[0] is None:
            return torch_tensors.Storage(block, dtype, count)
        _, start, part = view[0]
        if not 0 <= start <= start + part <= count:
            raise ValueError(f"a part of storage {key!r} lies outside of it")
        return torch_tensors.Storage(block, dtype, part, start)

    def require_within(self, size: int) -> None:
        """Raises ValueError unless the storages fit into a file of `size` bytes."""
        if sum(block.size for block in self.blocks.values()) > size:
            raise ValueError("its storages are larger than the file")


def _content(path: pathlib.Path) -> Any:
    """Returns the object in a file, whichever of the formats it has."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
        file.seek(0)
        if start.startswith(b"PK\3\4"):
            return _archive(path, file, size)
        if start.startswith(b"\x80"):  # of every pickle since protocol 2
            return _pickles(path, file, size)
    if not start:
        raise ValueError("it is empty")
    if start[257:262] == b"ustar":
        raise ValueError("it is a tar archive: unpack it")
    known = [text for first, text in _MISTAKEN if start.lstrip().startswith(first)]
    raise ValueError(known[0] if known else "neither an archive nor a pickle")


def _archive(path: pathlib.Path, file: BinaryIO, size: int) -> Any:
    """Reads a zip archive, the format since torch 1.6."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if _is_pickle(name)]
    if len(roots) != 1:
        raise ValueError("an archive without a data.pkl")
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise pickles.Refusal("it is a TorchScript program")

    def block(name: str) -> torch_tensors.Block:
        if f"{root}{name}" not in members:
            raise ValueError(f"it refers to {name!r}, which is not in the archive")
        return _member(path, file, members[f"{root}{name}"], size)

    if f"{root}byteorder" in members and block("byteorder").content != b"little":
        raise ValueError("a machine of the other byte order wrote it")
    content, storages = block("data.pkl").content, _Storages(path)
    loaded = pickles.load(
        io.BytesIO(content), len(content), torch_tensors.CALLS, storages.refer
    )
    storages.require_within(size)
    for key, wanted in storages.blocks.items():
        found = block(f"data/{key}")
        if found.size != wanted.size:
            raise ValueError(
                f"storage {key!r} has {found.size} bytes instead of {wanted.size}"
            )
        wanted.place, wanted.checksum = found.place, found.checksum
    return loaded


def _is_pickle(name: str) -> bool:
    return name.rpartition("/")[2] == "data.pkl"


def _member(
    path: pathlib.Path, file: BinaryIO, member: zipfile.ZipInfo, size: int
) -> torch_tensors.Block:
    """Returns where a member of an archive lies; torch compresses none."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError("its members are compressed, which torch does not do")
    file.seek(member.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    place = file.tell() + name + extra
    if signature != b"PK\3\4" or place + member.file_size > size:
        raise ValueError("a member lies outside of the archive")
    return torch_tensors.Block(path, member.file_size, place, member.CRC)


def _pickles(path: pathlib.Path, file: BinaryIO, size: int) -> Any:
    """Reads the older format, or a pickle that torch did not write."""
    storages = _Storages(path)

    def pickled() -> Any:
        left = size - file.tell()
        return pickles.load(file, left, torch_tensors.CALLS, storages.refer)

    first = pickled()
    if first != _MAGIC:
        storages.require_within(0)
        return first
    if pickled() != 1001:
        raise ValueError("an unknown version of the older format")
    pickled()  # the sizes of C's types
    loaded, keys = pickled(), pickled()
    storages.require_within(size)
    if sorted(keys) != sorted(storages.blocks):
        raise ValueError("it refers to storages that it does not hold")
    for key in keys:
        block = storages.blocks[key]
        file.seek(8, io.SEEK_CUR)  # the count of numbers, once more
        block.place = file.tell()
        if file.seek(block.size, io.SEEK_CUR) > size:
            raise ValueError("it ends too early")
    return loaded


def _refusal(path: pathlib.Path, reason: str) -> str:
    return (
        f"{path} is refused because reading it would run code: {reason}.\n"
        "Only plain weights are read. Save nothing else where the network was "
        "trained:\ntorch.save(model.state_dict(), FILE)"
    )


def _unreadable(path: pathlib.Path, error: Exception) -> str:
    reason = str(error).partition("\n")[0][:200] or type(error).__name__
    return (
        f"{path} is not a readable PyTorch file ({reason}); it is damaged or of "
        "another kind: copy it again, or save model.state_dict()"
    )
