"""Unwraps PyTorch state dictionaries into NumPy arrays, without torch."""

import collections.abc
from typing import Any

import jax.numpy as jnp
import numpy as np

from lakd_jax import errors

_WRAPPERS = ("state_dict", "model", "net")
# Prefixes that DataParallel, Lightning and torch.compile add to every key.
_PREFIXES = ("module.", "model.", "net.", "_orig_mod.")


def plain(state_dict: collections.abc.Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Unwraps a state dictionary into name -> array, in PyTorch's layout.

    Looks inside "state_dict", "model" and "net", strips prefixes that all keys share,
    and drops entries that are not tensors (epoch, accuracy) and the counters
    `num_batches_tracked`. Values may be NumPy arrays or torch tensors, and keep their
    dtype.

    Raises:
        errors.TeacherError: it has no tensors, or one of a quantised dtype.
    """
    while inner := [state_dict[key] for key in _WRAPPERS if _wraps(state_dict, key)]:
        state_dict = inner[0]
    tensors = {key: value for key, value in state_dict.items() if _is_tensor(value)}
    while tensors and (prefix := _common_prefix(tensors)):
        tensors = {key.removeprefix(prefix): tensors[key] for key in tensors}
    if not tensors:
        raise errors.TeacherError(
            "no tensors found: expected a state_dict, bare or under one of "
            + ", ".join(repr(key) for key in _WRAPPERS)
        )
    return {
        key: _to_numpy(key, value)
        for key, value in tensors.items()
        if not key.endswith("num_batches_tracked")
    }


def other_types(tensors: collections.abc.Mapping[str, np.ndarray]) -> list[str]:
    """Returns the dtypes in `tensors` other than float32, such as "bfloat16"."""
    return sorted({value.dtype.name for value in tensors.values()} - {"float32"})


def _wraps(state_dict: collections.abc.Mapping[str, Any], key: str) -> bool:
    return isinstance(state_dict.get(key), collections.abc.Mapping)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _common_prefix(keys: collections.abc.Iterable[str]) -> str:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in keys):
            return prefix
    return ""


def _to_numpy(key: str, value: Any) -> np.ndarray:
    """Converts an array or torch tensor to NumPy, without importing torch."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # torch cannot convert it to NumPy
        return value.float().numpy().astype(jnp.bfloat16)
    try:
        return value.numpy()
    except (TypeError, RuntimeError) as error:
        raise errors.TeacherError(
            f"{key} holds {value.dtype}, which NumPy does not support; save the "
            "weights as float32"
        ) from error
