"""Converts weights between our networks and their PyTorch counterparts."""

import collections.abc
import contextlib
import functools
import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import errors, models
from lakd_jax.interop import layout
from lakd_jax.interop import state_dict as state_dicts
from lakd_jax.models import chain


def from_torch(
    name: str,
    state_dict: collections.abc.Mapping[str, Any],
    *,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Converts a PyTorch state dictionary to variables of network `name`.

    The matching network is `models.create(name, **options_from_torch(...))`.

    Args:
        name: one of `models.names()`.
        state_dict: key to NumPy array or torch tensor, bare or as checkpoints wrap it
            (see `state_dict.plain`), with the names of any of the family's `NAMINGS`
            (such as timm's or torchvision's) or `TORCH_ALIASES`.
        dtype: of the returned arrays.

    Returns:
        {"params": ..., "batch_stats": ...} of NumPy arrays in our layout (HWIO, IO).

    Raises:
        errors.TeacherError: keys are missing, surplus or of another shape (the message
            suggests registered networks that fit), or values are not finite floats.
        ValueError: unknown name.
    """
    cls = models.family(name)
    original = state_dicts.plain(state_dict)
    tensors, original_keys = _canonical(cls, original)
    found = {key: value.shape for key, value in tensors.items()}
    table = layout.nearest_table(name, _options(name, tensors, original), found)
    expected = _torch_shapes(table)
    if found != expected:
        raise errors.TeacherError(
            _misfit(name, expected, found, original_keys, original)
        )
    _check_values(name, tensors, original_keys)
    leaves = {
        entry.path: layout.to_flax(tensors[key], entry).astype(dtype)
        for key, entry in table.items()
    }
    return flax.traverse_util.unflatten_dict(leaves)


def to_torch(
    name: str, variables: collections.abc.Mapping[str, Any], naming: str = ""
) -> dict[str, np.ndarray]:
    """Converts variables to a PyTorch state dictionary; inverts `from_torch` exactly.

    Args:
        name: one of `models.names()`.
        variables: {"params": ..., "batch_stats": ...} of arrays, from `from_torch` or
            training; the class count and the options are inferred from them.
        naming: whose names to use, one of `models.family(name).NAMINGS`, such as
            "timm"; "" for the first of them, the reference.

    Returns:
        PyTorch key to float32 array in PyTorch's layout (OIHW, OI), without the
        counters `num_batches_tracked`, which our networks do not have.

    Raises:
        ValueError: unknown name or naming, or variables of another network (lists ten
            keys).
    """
    leaves: dict[layout.Path, Any] = flax.traverse_util.flatten_dict(dict(variables))
    naming = layout.naming(name, naming)
    keys = layout.keys(name, naming, leaves)
    shapes = {
        keys[path][0]: layout.torch_shape(path, leaf.shape, keys[path][1])
        for path, leaf in leaves.items()
        if path in keys
    }
    try:
        table = layout.table(name, layout.options(name, shapes), naming)
    except errors.TeacherError as error:
        raise ValueError(str(error)) from error
    expected = {"/".join(entry.path): entry.shape for entry in table.values()}
    found = {"/".join(path): tuple(leaf.shape) for path, leaf in leaves.items()}
    if lines := layout.faults(expected, found):
        raise ValueError("\n".join([f"the variables are not those of {name}:", *lines]))
    return {
        key: layout.to_torch(np.asarray(leaves[entry.path], np.float32), entry)
        for key, entry in table.items()
    }


def options_from_torch(
    name: str, state_dict: collections.abc.Mapping[str, Any]
) -> dict[str, Any]:
    """Infers the arguments of `models.create` for these weights, such as classes.

    Raises errors.TeacherError if the classifier's weight is missing or not a matrix.
    """
    original = state_dicts.plain(state_dict)
    return _options(name, _canonical(models.family(name), original)[0], original)


def _options(
    name: str,
    tensors: collections.abc.Mapping[str, np.ndarray],
    original: collections.abc.Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Infers the options of network `name`; describes the weights if it cannot."""
    try:
        return layout.options(
            name, {key: value.shape for key, value in tensors.items()}
        )
    except errors.TeacherError as error:
        lines = [str(error), *_description(original)]
        raise errors.TeacherError("\n".join(lines)) from error


def _canonical(
    cls: type[chain.Chain], tensors: collections.abc.Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Translates keys to the reference's; also returns canonical -> original key.

    A key whose translation already exists is kept as it is, and so counts as surplus.
    """
    result, original_keys = {}, {}
    for key, value in tensors.items():
        new = key
        for pattern, replacement in cls.TORCH_ALIASES:
            new = re.sub(pattern, replacement, new)
        if new != key and (new in tensors or new in result):
            new = key
        result[new], original_keys[new] = value, key
    return result, original_keys


def _torch_shapes(table: layout.Table) -> dict[str, layout.Shape]:
    return {key: entry.torch_shape for key, entry in table.items()}


def _misfit(
    name: str,
    expected: layout.Shapes,
    found: layout.Shapes,
    original_keys: collections.abc.Mapping[str, str],
    original: collections.abc.Mapping[str, np.ndarray],
) -> str:
    """Describes a mismatch with up to ten keys, and suggests networks that fit."""
    heading = f"the weights do not fit {name}:"
    transposed = {key: value.T for key, value in original.items() if value.ndim == 2}
    if _fits(name, {**original, **transposed}):
        shown = [f"{key} {original[key].shape}" for key in transposed]
        more = len(shown) - layout.LISTED
        what = ", ".join(shown[: layout.LISTED]) + (f" and {more} more" * (more > 0))
        return (
            f"{heading}\n  {what} looks transposed: PyTorch keeps (outputs, inputs); "
            "save its transpose"
        )
    found = {original_keys[key]: shape for key, shape in found.items()}
    expected = {original_keys.get(key, key): shape for key, shape in expected.items()}
    lines = [heading, *layout.faults(expected, found), *_description(original)]
    return "\n".join(lines)


def _description(original: collections.abc.Mapping[str, np.ndarray]) -> list[str]:
    """Returns lines with the first keys, and the networks that fit or come nearest."""
    likely = [name for name in models.names() if _has_similar_depth(name, original)]
    if fitting := [name for name in likely if _fits(name, original)]:
        last = f"they fit {' or '.join(fitting)}: use that network instead"
    else:
        last = f"no registered network fits them; {_nearest(likely, original)}"
    return [f"  the file's first keys: {state_dicts.listed(original)}", last]


def _nearest(
    names: list[str], original: collections.abc.Mapping[str, np.ndarray]
) -> str:
    """Returns the one of `names` that shares the most tensors with the weights.

    Of those whose classifier the weights have, or else of all, without it.
    """
    arrays = {name: _canonical(models.family(name), original)[0] for name in names}
    shapes = {n: {k: v.shape for k, v in found.items()} for n, found in arrays.items()}
    known: dict[str, dict[str, Any]] = {}
    for name in names:
        with contextlib.suppress(errors.TeacherError):
            known[name] = layout.options(name, shapes[name])
    if not known:
        likely = [name for name in names if _has_stem(name, shapes[name])]
        known = {name: _any_options(name) for name in likely or names}
    best, nearest = 0.0, ""
    for name, options in known.items():
        found = shapes[name]
        expected = _torch_shapes(layout.nearest_table(name, options, found))
        same = sum(found.get(key) == shape for key, shape in expected.items())
        if (share := same / max(len(expected), len(found))) > best:
            best = share
            nearest = (
                f"the nearest is {name}: {same} of its {len(expected)} tensors fit"
            )
    return nearest or f"known: {', '.join(models.names())}"


def _any_options(name: str) -> dict[str, Any]:
    return {"num_classes": 1, **models.family(name).tree_options()[0]}


def _has_stem(name: str, found: layout.Shapes) -> bool:
    """Returns whether all keys of the stem are there; cheaper than tracing the rest."""
    model = models.create(name, **_any_options(name))
    side = model.any_side
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    init = functools.partial(model.init, train=False, until="stem")
    stem: Any = jax.eval_shape(init, jax.random.key(0), images)
    paths = [path[1:] for path in flax.traverse_util.flatten_dict(stem)]
    return any(
        all(model.key(path, naming) in found for path in paths)
        for naming in model.NAMINGS
    )


def _has_similar_depth(
    name: str, original: collections.abc.Mapping[str, np.ndarray]
) -> bool:
    """Returns whether `name` may fit by its number of kernels; cheaper than tracing.

    Kernels are those of convolutions and matrices.
    """
    units = len(models.create(name, num_classes=1).unit_names)
    kernels = sum(value.ndim in (2, 4) for value in original.values())
    return units <= kernels <= 6 * units


def _fits(name: str, original: collections.abc.Mapping[str, np.ndarray]) -> bool:
    tensors, _ = _canonical(models.family(name), original)
    found = {key: value.shape for key, value in tensors.items()}
    try:
        options = layout.options(name, found)
    except errors.TeacherError:
        return False
    return _torch_shapes(layout.nearest_table(name, options, found)) == found


def _check_values(
    name: str,
    tensors: collections.abc.Mapping[str, np.ndarray],
    original_keys: collections.abc.Mapping[str, str],
) -> None:
    """Raises TeacherError unless all weights are finite and of floating type."""
    not_floating = {
        original_keys[key]: value.dtype.name
        for key, value in tensors.items()
        if not jnp.issubdtype(value.dtype, jnp.floating)
    }
    if not_floating:
        dtypes = " and ".join(sorted(set(not_floating.values())))
        shown = ", ".join(list(not_floating)[: layout.LISTED])
        raise errors.TeacherError(
            f"the weights for {name} hold {dtypes} in {len(not_floating)} tensors: "
            f"{shown}; save them in floating point"
        )
    bad = [original_keys[k] for k, v in tensors.items() if not np.all(np.isfinite(v))]
    if bad:
        raise errors.TeacherError(
            f"the weights for {name} hold NaN or infinity in {len(bad)} tensors: "
            f"{', '.join(bad[: layout.LISTED])}; use another checkpoint"
        )
