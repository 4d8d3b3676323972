"""Weight files: PyTorch's, and our own variables as flat safetensors."""

import collections.abc
import json
import os
import pathlib
from typing import Any

import flax
import numpy as np
import safetensors
import safetensors.numpy

from lakd_jax import errors
from lakd_jax.interop import state_dict as state_dicts

_FORMAT = "lakd_jax"  # marks our files, as "pt" marks PyTorch's
_TORCH_SUFFIXES = (".pt", ".pth", ".th")


def load_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a PyTorch state dictionary, unwrapped, in PyTorch's names and layout.

    Files ending in .safetensors need nothing more; .pt, .pth and .th are read by
    torch (an optional dependency), with `weights_only=True` so that no code in the
    file runs.

    Raises:
        errors.TeacherError: no such file, another ending, unreadable, no tensors in
            it, or torch is needed and not installed.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        _, tensors = _read_safetensors(path)
        return state_dicts.plain(tensors)
    if path.suffix not in _TORCH_SUFFIXES:
        raise errors.TeacherError(
            f"{path}: unknown ending {path.suffix!r}; expected .safetensors or one of "
            + ", ".join(_TORCH_SUFFIXES)
        )
    content = _torch_load(path)
    if not isinstance(content, collections.abc.Mapping):
        raise errors.TeacherError(
            f"{path} holds a {type(content).__name__}, not a state_dict; save "
            "model.state_dict() instead"
        )
    return state_dicts.plain(content)


def save_variables(
    path: str | os.PathLike,
    variables: collections.abc.Mapping[str, Any],
    metadata: collections.abc.Mapping[str, Any],
) -> None:
    """Write a tree of arrays as safetensors with keys like "params/head/dense/bias".

    The file appears whole or not at all: it is written beside its place and renamed.

    Args:
        path: where to; its folder must exist.
        variables: nested dictionaries of arrays, in any dtype safetensors knows.
        metadata: anything JSON can hold (the network's name, options, ...).
    """
    path = pathlib.Path(path)
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {key: np.asarray(value, order="C") for key, value in flat.items()}
    header = {"format": _FORMAT, "metadata": json.dumps(dict(metadata))}
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file(arrays, partial, metadata=header)
    os.replace(partial, path)


def load_variables(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_variables` wrote, to the bit: (variables, metadata).

    Raises errors.TeacherError if the file is missing, damaged or not ours.
    """
    path = _existing(path)
    header, arrays = _read_safetensors(path)
    if header.get("format") != _FORMAT:
        raise errors.TeacherError(
            f"{path} was not written by lakd_jax; read PyTorch weights with "
            "load_torch_file and from_torch"
        )
    variables = flax.traverse_util.unflatten_dict(arrays, sep="/")
    return variables, json.loads(header["metadata"])


def is_variables_file(path: str | os.PathLike) -> bool:
    """Whether `load_variables`, rather than `load_torch_file`, reads this file.

    Raises errors.TeacherError if it is missing, or ends in .safetensors and is none.
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        return False
    header, _ = _read_safetensors(path)
    return header.get("format") == _FORMAT


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise errors.TeacherError(f"no weights at {path}; check the path")
    return path


def _read_safetensors(
    path: pathlib.Path,
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            return header, {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.TeacherError(
            f"{path} is no readable safetensors file ({error}); copy it again"
        ) from error


def _torch_load(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise errors.TeacherError(
            f"reading {path} needs torch, which is not installed: pip install torch, "
            "or convert the file to .safetensors where it is"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise errors.TeacherError(
            f"torch cannot read {path} as plain weights: {reason}"
        ) from error
