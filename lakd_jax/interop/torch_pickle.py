"""PyTorch's own files (.pt, .pth, .th): pickles, of which only the weights are read."""

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
    """What the file holds, read with `weights_only=True`: nothing in it can run.

    Raises:
        errors.TeacherError: unreadable, made to run code, no dictionary, or torch is
            not installed or too old.
    """
    try:
        import torch  # optional, and slow: only where a file needs it
    except ImportError as error:
        raise errors.TeacherError(
            f"reading {path} needs torch, which is not installed: pip install torch, "
            "or convert the file to .safetensors where it is"
        ) from error
    # Before 2.6 a file could run code all the same (CVE-2025-32434).
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise errors.TeacherError(
            f"reading {path} safely needs torch 2.6 or newer, here is "
            f"{torch.__version__}: pip install -U torch, or convert the file to "
            ".safetensors elsewhere"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it, or nothing does
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to its own
        raise errors.TeacherError(_refusal(path, error)) from error
    if not isinstance(content, collections.abc.Mapping):
        raise errors.TeacherError(
            f"{path} holds a {type(content).__name__}, not a state_dict; save "
            "model.state_dict() instead"
        )
    return content


def dump(tensors: collections.abc.Mapping[str, np.ndarray]) -> bytes:
    """A file of a plain dictionary of tensors; errors.ExportError without torch."""
    try:
        import torch  # optional, and slow: only where a file needs it
    except ImportError as error:
        raise errors.ExportError(
            "writing a PyTorch file needs torch, which is not installed: pip install "
            "torch, or export safetensors, which PyTorch's users read too"
        ) from error
    content = {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _refusal(path: pathlib.Path, error: Exception) -> str:
    """Why torch did not read the file, and what to do."""
    if code := _code_in(path, error):
        return (
            f"{path} is refused because reading it would run code: {code}.\n"
            "Only plain weights are read. Where the network is at home, save nothing "
            "else:\ntorch.save(model.state_dict(), FILE)"
        )
    # The first sentence: later ones tell users of torch to let the file run code.
    text = re.sub(r"^\[.*?\] \. ", "", str(error))
    reason = re.split(r"\.\s", text.partition("\n")[0])[0] or type(error).__name__
    return (
        f"{path} is no readable PyTorch file ({reason}); it is damaged or of another "
        "kind: copy it again, or save model.state_dict()"
    )


def _code_in(path: pathlib.Path, error: Exception) -> str:
    """What the file would run; "" if that is not why torch refused it."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript program"
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {name[1]}"
    with open(path, "rb") as file:
        start = file.read(2)
    # Weights that torch wrote are a zip, or pickles of protocol 2.
    foreign = start[:1] == pickle.PROTO and start[1:] > b"\2"
    return "it is a pickle that torch did not write" if foreign else ""
