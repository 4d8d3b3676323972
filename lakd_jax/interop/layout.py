"""The correspondence between PyTorch state dictionaries and our variables."""

import collections.abc
import functools
from typing import Any

import flax
import numpy as np

from lakd_jax import errors, models
from lakd_jax.models import chain

LISTED = 10  # keys named in an error message
Path = tuple[str, ...]
Shape = tuple[int, ...]
Shapes = collections.abc.Mapping[str, Shape]


def options(name: str, shapes: Shapes) -> dict[str, Any]:
    """Infers the options of network `name` from PyTorch keys and shapes.

    Raises errors.TeacherError if the classifier is missing or not a matrix.
    """
    try:
        return models.family(name).options_from_torch(shapes)
    except KeyError as error:
        raise errors.TeacherError(
            f"the weights do not fit {name}: no usable {error.args[0]!r}, from which "
            "the number of classes is read; check that the file holds a classifier"
        ) from error


def table(
    name: str, options: collections.abc.Mapping[str, Any]
) -> dict[str, tuple[Path, Shape]]:
    """Returns PyTorch key -> (path in our tree, our shape) for a network's arrays."""
    return _traced(name, tuple(sorted(options.items())))


def keys(name: str) -> dict[Path, str]:
    """Returns path in our tree -> PyTorch key, for all options of network `name`."""
    result: dict[Path, str] = {}
    for chosen in models.family(name).tree_options():
        traced = table(name, {"num_classes": 1, **chosen})
        result |= {path: key for key, (path, _) in traced.items()}
    return result


def torch_shape(shape: Shape) -> Shape:
    """Permutes a shape HWIO -> OIHW or IO -> OI; vectors are unchanged."""
    return shape if len(shape) == 3 else (*shape[:-3:-1], *shape[:-2])


def to_flax(array: np.ndarray) -> np.ndarray:
    """Transposes OIHW -> HWIO or OI -> IO; vectors are unchanged."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_torch(array: np.ndarray) -> np.ndarray:
    """Transposes HWIO -> OIHW or IO -> OI; vectors are unchanged."""
    transposed = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.ascontiguousarray(transposed)


def faults(expected: Shapes, found: Shapes) -> list[str]:
    """Returns a line per kind of mismatch, with at most ten keys in total."""
    misshaped = [
        f"{key} {found[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    kinds = {
        "missing": [key for key in expected if key not in found],
        "surplus": [key for key in found if key not in expected],
        "of another shape": misshaped,
    }
    kinds = {kind: names for kind, names in kinds.items() if names}
    lines = []
    for kind, names in kinds.items():
        shown = names[: LISTED // len(kinds)]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        lines.append(f"  {len(names)} {kind}: {', '.join(shown)}{more}")
    return lines


def clear_cache() -> None:
    """Discards traced networks, for when a name refers to another network."""
    _traced.cache_clear()


@functools.cache  # tracing a deep network takes up to a second
def _traced(
    name: str, options: tuple[tuple[str, Any], ...]
) -> dict[str, tuple[Path, Shape]]:
    model = models.create(name, **dict(options))
    variables = chain.variable_shapes(model)
    leaves: dict[Path, Any] = flax.traverse_util.flatten_dict(variables)
    return {
        model.torch_key(path[1:], model.NAMINGS[0]): (path, leaf.shape)
        for path, leaf in leaves.items()
    }
