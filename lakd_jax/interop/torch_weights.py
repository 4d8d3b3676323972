"""Variables of our networks from the weights of their PyTorch counterparts."""

import collections.abc
import functools
import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import errors, models
from lakd_jax.interop import state_dict as state_dicts
from lakd_jax.models import chain

_LISTED = 10  # keys named in an error message
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_Path = tuple[str, ...]
_Shape = tuple[int, ...]


def from_torch(
    name: str,
    state_dict: collections.abc.Mapping[str, Any],
    *,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """The variables of network `name` from a PyTorch state dictionary.

    The network to apply them to is `models.create(name, **options_from_torch(...))`.

    Args:
        name: one of `models.names()`.
        state_dict: key to NumPy array or torch tensor, bare or as checkpoints wrap it
            (see `state_dict.plain`); spellings other than the reference ones are
            translated by the family's `TORCH_ALIASES`.
        dtype: of the arrays returned.

    Returns:
        {"params": ..., "batch_stats": ...} of NumPy arrays in our layout (HWIO, IO).

    Raises:
        errors.TeacherError: keys missing, surplus or of another shape (says which
            registered network would fit), or values that are not finite.
        ValueError: unknown name.
    """
    cls = models.family(name)
    tensors, spelled = _canonical(cls, state_dicts.plain(state_dict))
    shapes = {key: value.shape for key, value in tensors.items()}
    expected = _expected(name, _options(name, shapes))
    faults = _faults(expected, shapes, spelled)
    if faults:
        raise errors.TeacherError(_misfit_message(name, shapes, faults))
    _check_finite(name, tensors, spelled)
    leaves = {
        path: _to_flax(tensors[key]).astype(dtype)
        for key, (path, _) in expected.items()
    }
    return flax.traverse_util.unflatten_dict(leaves)


def options_from_torch(
    name: str, state_dict: collections.abc.Mapping[str, Any]
) -> dict[str, Any]:
    """What to give `models.create` for these weights: class count and shortcut.

    Raises errors.TeacherError if the classifier's weight is missing or no matrix.
    """
    cls = models.family(name)
    tensors, _ = _canonical(cls, state_dicts.plain(state_dict))
    return _options(name, {key: value.shape for key, value in tensors.items()})


def _canonical(
    cls: type[chain.Chain], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Translate keys to the reference's; also gives canonical -> original key.

    A key whose translation is taken keeps its own name and so counts as surplus.
    """
    result, spelled = {}, {}
    for key, value in tensors.items():
        new = key
        for pattern, replacement in cls.TORCH_ALIASES:
            new = re.sub(pattern, replacement, new)
        if new != key and (new in tensors or new in result):
            new = key
        result[new], spelled[new] = value, key
    return result, spelled


def _options(name: str, shapes: collections.abc.Mapping[str, _Shape]) -> dict[str, Any]:
    """The options that keys and shapes tell; TeacherError if they do not."""
    try:
        return models.family(name).options_from_torch(shapes)
    except KeyError as error:
        raise errors.TeacherError(
            f"the weights do not fit {name}: no usable {error.args[0]!r}, from which "
            "the number of classes is read; check that the file holds a classifier"
        ) from error


def _expected(
    name: str, options: collections.abc.Mapping[str, Any]
) -> dict[str, tuple[_Path, _Shape]]:
    """PyTorch key -> (path in our tree, PyTorch shape) for every array."""
    return _traced(name, tuple(sorted(options.items())))


@functools.cache  # tracing a deep network takes a good part of a second
def _traced(
    name: str, options: tuple[tuple[str, Any], ...]
) -> dict[str, tuple[_Path, _Shape]]:
    model = models.create(name, **dict(options))
    # The spatial size is of no matter to shapes; 32 survives five halvings.
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables: Any = jax.eval_shape(init, jax.random.key(0), images)
    leaves: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables)
    return {
        f"{model.torch_name(path[1:-1])}.{_LEAVES[path[-1]]}": (
            path,
            _torch_shape(leaf.shape),
        )
        for path, leaf in leaves.items()
    }


def _torch_shape(shape: _Shape) -> _Shape:
    """HWIO -> OIHW, IO -> OI; vectors stay."""
    return (*shape[:-3:-1], *shape[:-2])


def _to_flax(array: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO, OI -> IO; vectors stay."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


def _faults(
    expected: collections.abc.Mapping[str, tuple[_Path, _Shape]],
    shapes: collections.abc.Mapping[str, _Shape],
    spelled: collections.abc.Mapping[str, str],
) -> dict[str, list[str]]:
    """The keys that do not fit, by what is wrong with them; empty if all do."""
    wrong = [
        f"{spelled[key]} {shapes[key]} instead of {shape}"
        for key, (_, shape) in expected.items()
        if key in shapes and shapes[key] != shape
    ]
    faults = {
        "missing": [key for key in expected if key not in shapes],
        "surplus": [spelled[key] for key in shapes if key not in expected],
        "of another shape": wrong,
    }
    return {kind: keys for kind, keys in faults.items() if keys}


def _misfit_message(
    name: str,
    shapes: collections.abc.Mapping[str, _Shape],
    faults: collections.abc.Mapping[str, list[str]],
) -> str:
    """Say what does not fit, with up to ten keys, and which network would."""
    lines = [f"the weights do not fit {name}:"]
    for kind, keys in faults.items():
        shown = keys[: _LISTED // len(faults)]
        more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
        lines.append(f"  {len(keys)} {kind}: {', '.join(shown)}{more}")
    fitting = [other for other in models.names() if _fits(other, shapes)]
    if fitting:
        lines.append(f"they fit {' or '.join(fitting)}: ask for that network instead")
    else:
        known = ", ".join(models.names())
        lines.append(f"no registered network fits them; known: {known}")
    return "\n".join(lines)


def _fits(name: str, shapes: collections.abc.Mapping[str, _Shape]) -> bool:
    try:
        expected = _expected(name, _options(name, shapes))
    except errors.TeacherError:
        return False
    return {key: shape for key, (_, shape) in expected.items()} == dict(shapes)


def _check_finite(
    name: str,
    tensors: collections.abc.Mapping[str, np.ndarray],
    spelled: collections.abc.Mapping[str, str],
) -> None:
    bad = [spelled[k] for k, v in tensors.items() if not np.all(np.isfinite(v))]
    if bad:
        raise errors.TeacherError(
            f"the weights for {name} hold NaN or infinity in {len(bad)} tensors: "
            f"{', '.join(bad[:_LISTED])}; use another checkpoint"
        )
