"""Unwraps PyTorch state dictionaries into NumPy arrays, without torch."""

import collections.abc
from typing import Any

import jax.numpy as jnp
import numpy as np

from lakd_jax import errors
from lakd_jax.interop import pickles, torch_tensors

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "student")
# Prefixes that DataParallel, Lightning and torch.compile add to every key.
_PREFIXES = (
    "module.",
    "model.",
    "net.",
    "network.",
    "backbone.",
    "student.",
    "_orig_mod.",
)
_DEEPEST = 8  # wrappers in wrappers; a damaged file can contain itself
_LISTED = 5  # keys named in an error message

Mapping = collections.abc.Mapping[str, Any]


def plain(state_dict: Mapping, key: str = "") -> dict[str, np.ndarray]:
    """Unwraps a state dictionary into name -> array, in PyTorch's layout.

    Looks inside the entries that checkpoints commonly have ("state_dict", "model",
    ...), strips prefixes that all layers share, and drops entries that are not
    tensors (epoch, accuracy), what lies beside the layers (a loss's class weights) and
    counters. Values may be NumPy arrays, torch tensors or those of a file, and keep
    their dtype.

    Args:
        state_dict: bare, or as checkpoints wrap it.
        key: the entry to look inside first, such as "state_dict_ema", or a prefix of
            names, such as "teacher"; "" for the network that was trained.

    Raises:
        errors.TeacherError: it has no tensors or no such entry, or one of a dtype that
            NumPy does not have.
    """
    chosen = state_dict
    if key and isinstance(chosen.get(key), collections.abc.Mapping):
        chosen, key = chosen[key], ""
    for _ in range(_DEEPEST):
        inner = [chosen[name] for name in _WRAPPERS if _wraps(chosen.get(name))]
        if not inner:
            break
        chosen = inner[0]
    tensors = {
        name: value
        for name, value in chosen.items()
        if isinstance(name, str) and _is_tensor(value)
    }
    if key:
        tensors = _under(f"{key}.", tensors)
    if not any(map(_axes, tensors.values())):
        raise errors.TeacherError(_nothing(state_dict, key))
    while prefix := _common_prefix(tensors):
        tensors = _under(prefix, tensors)
    return {
        name: _to_numpy(name, value)
        for name, value in tensors.items()
        if not name.endswith("num_batches_tracked")
    }


def other_types(tensors: collections.abc.Mapping[str, np.ndarray]) -> list[str]:
    """Returns the dtypes in `tensors` other than float32, such as "bfloat16"."""
    return sorted({value.dtype.name for value in tensors.values()} - {"float32"})


def listed(keys: collections.abc.Iterable[Any]) -> str:
    """Returns the first five keys, for an error message."""
    keys = [str(key) for key in keys]
    return ", ".join(keys[:_LISTED]) + (", ..." if len(keys) > _LISTED else "")


def _wraps(value: Any, seen: tuple[int, ...] = ()) -> bool:
    """Returns whether a value is a dictionary with tensors, perhaps wrapped again."""
    if not isinstance(value, collections.abc.Mapping) or id(value) in seen:
        return False
    if any(_is_tensor(inner) for inner in value.values()):
        return True
    seen = (*seen, id(value))
    inner = [value[name] for name in _WRAPPERS if name in value]
    return len(seen) < _DEEPEST and any(_wraps(one, seen) for one in inner)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and (
        hasattr(value, "dtype") or isinstance(value, torch_tensors.Array)
    )


def _axes(value: Any) -> int:
    """Returns the axes of a tensor; one that cannot be read is never left out."""
    return 2 if getattr(value, "fault", "") else len(value.shape)


def _under(prefix: str, tensors: Mapping) -> dict[str, Any]:
    """Returns the tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _common_prefix(tensors: Mapping) -> str:
    """Returns a prefix of all layers; "" for none.

    What lies beside them has no matrix and no kernel: the buffers of a loss, or the
    counter of an average of weights.
    """
    for prefix in _PREFIXES:
        beside = [v for name, v in tensors.items() if not name.startswith(prefix)]
        if len(beside) < len(tensors) and all(_axes(v) < 2 for v in beside):
            return prefix
    return ""


def _nothing(state_dict: Mapping, key: str) -> str:
    """Describes a file without the weights that were asked for, and its entries."""
    if key:
        problem = f"it has no entry {key!r} with tensors"
    else:
        wrappers = ", ".join(repr(name) for name in _WRAPPERS)
        problem = (
            f"no tensors found: expected a state_dict, bare or under one of {wrappers}"
        )
    has = listed(map(repr, state_dict)) or "none"
    lines = [f"{problem}; its entries: {has}"]
    for name, value in state_dict.items():
        if isinstance(value, pickles.Placeholder) and name in (*_WRAPPERS, key):
            lines.append(
                f"{name!r} is a pickled {value.name}, whose code is not run: save "
                "model.state_dict() instead"
            )
    if usable := [repr(name) for name, value in state_dict.items() if _wraps(value)]:
        lines.append(
            f"tensors are in {listed(usable)}: name the entry in teacher.init_key or "
            "student.init_key (in Python, load_torch_file's key)"
        )
    return "\n".join(lines)


def _to_numpy(name: str, value: Any) -> np.ndarray:
    """Converts an array or tensor to NumPy, without importing torch."""
    if isinstance(value, torch_tensors.Tensor | torch_tensors.Array):
        return _from_file(name, value)
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # torch cannot convert it to NumPy
        return value.float().numpy().astype(jnp.bfloat16)
    try:
        return value.numpy()
    except (TypeError, RuntimeError) as error:
        raise errors.TeacherError(_unsupported(name, value.dtype)) from error


def _from_file(
    name: str, value: torch_tensors.Tensor | torch_tensors.Array
) -> np.ndarray:
    if value.fault:
        raise errors.TeacherError(_unsupported(name, value.fault))
    try:
        return value.array()
    except (ValueError, OSError) as error:
        raise errors.TeacherError(
            f"{name} cannot be read ({error}); copy the file again"
        ) from error


def _unsupported(name: str, what: Any) -> str:
    return f"{name} holds {what}, which is not read; save the weights as float32"
