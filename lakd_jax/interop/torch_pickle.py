"""Reads and writes PyTorch's pickle files (.pt, .pth, .th); reads only weights."""

import collections.abc
import io
import pathlib
import pickle
import re
import warnings
from typing import Any

import numpy as np

from lakd_jax import errors

SUFFIXES = (".pt", ".pth", ".th")


def load(path: pathlib.Path) -> collections.abc.Mapping[str, Any]:
    """Reads a file with `weights_only=True`, so that no code in it can run.

    Raises:
        errors.TeacherError: the file cannot be read, would run code or holds no
            dictionary, or torch is not installed or too old.
    """
    try:
        import torch  # optional, and slow to import
    except ImportError as error:
        raise errors.TeacherError(
            f"reading {path} needs torch, which is not installed: pip install torch, "
            "or convert the file to .safetensors on a machine that has it"
        ) from error
    # Before 2.6 a file could run code nevertheless (CVE-2025-32434).
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise errors.TeacherError(
            f"reading {path} safely needs torch 2.6 or newer, but {torch.__version__} "
            "is installed: pip install -U torch, or convert the file to "
            ".safetensors elsewhere"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # faults are reported by the error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a wide range of exception types
        raise errors.TeacherError(_refusal(path, error)) from error
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


def _refusal(path: pathlib.Path, error: Exception) -> str:
    """Explains why torch did not read the file, and what to do."""
    if code := _code_in(path, error):
        return (
            f"{path} is refused because reading it would run code: {code}.\n"
            "Only plain weights are read. Save nothing else where the network was "
            "trained:\ntorch.save(model.state_dict(), FILE)"
        )
    # Only the first sentence: later ones suggest letting the file run code.
    text = re.sub(r"^\[.*?\] \. ", "", str(error))
    reason = re.split(r"\.\s", text.partition("\n")[0])[0] or type(error).__name__
    return (
        f"{path} is not a readable PyTorch file ({reason}); it is damaged or of "
        "another kind: copy it again, or save model.state_dict()"
    )


def _code_in(path: pathlib.Path, error: Exception) -> str:
    """Returns what the file would run; "" if torch refused it for another reason."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript program"
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it imports {name[1]}"
    with open(path, "rb") as file:
        start = file.read(2)
    # Weights written by torch are a zip archive, or pickles of protocol 2.
    foreign = start[:1] == pickle.PROTO and start[1:] > b"\2"
    return "it is a pickle that torch did not write" if foreign else ""
