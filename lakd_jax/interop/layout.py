"""The correspondence between PyTorch state dictionaries and our variables."""

import collections.abc
import functools
from typing import Any, NamedTuple

import flax
import numpy as np

from lakd_jax import errors, fields, models
from lakd_jax.models import chain, projector, torch_names

LISTED = 10  # keys named in an error message
Path = tuple[str, ...]
Shape = tuple[int, ...]
Shapes = collections.abc.Mapping[str, Shape]


def options(name: str, shapes: Shapes) -> dict[str, Any]:
    """Infers the options of network `name` from PyTorch keys and shapes.

    Raises errors.TeacherError if the classifier is missing or not a matrix.
    """
    try:
        found = models.family(name).options_from_torch(shapes)
    except KeyError as error:
        raise errors.TeacherError(
            f"the weights do not fit {name}: no usable {error.args[0]!r}, from which "
            "classes and options are read; check that the file holds the whole network"
        ) from error
    borrowed = projector.of_torch(shapes)
    return found | ({"projector": borrowed} if borrowed else {})


class Entry(NamedTuple):
    """Where an array of a network is, with us and in PyTorch.

    Attributes:
        path: in our tree.
        shape: in our layout.
        torch_shape: in PyTorch's.
    """

    path: Path
    shape: Shape
    torch_shape: Shape


Table = collections.abc.Mapping[str, Entry]


def naming(name: str, chosen: str) -> str:
    """Returns the naming `chosen` of network `name`; "" is the reference's.

    Raises ValueError if the network's weights are not published under that naming.
    """
    known = models.family(name).NAMINGS
    if chosen and (fault := fields.fault(chosen, filter(None, known))):
        if known == ("",):
            raise ValueError(f"naming is {chosen!r}, but {name} has only one: ''")
        raise ValueError(f"naming of {name} {fault}")
    return chosen or known[0]


def table(
    name: str, options: collections.abc.Mapping[str, Any], naming: str = ""
) -> dict[str, Entry]:
    """Returns PyTorch key -> `Entry` of a network's arrays, by the names of `naming`.

    "" is the reference's naming.
    """
    model, shapes = _traced(name, tuple(sorted(options.items())))
    entries = {}
    for path, shape in shapes.items():
        key = model.key(path[1:], naming or model.NAMINGS[0])
        there = torch_shape(path, shape, model.torch_ones(key))
        entries[key] = Entry(path, shape, there)
    return entries


def nearest_table(
    name: str,
    options: collections.abc.Mapping[str, Any],
    found: collections.abc.Collection[str],
) -> dict[str, Entry]:
    """Returns the table of the naming that shares the most keys with `found`."""
    namings = models.family(name).NAMINGS
    tables = (table(name, options, naming) for naming in namings)
    return max(tables, key=lambda entries: sum(key in entries for key in found))


def keys(
    name: str, naming: str, paths: collections.abc.Iterable[Path] = ()
) -> dict[Path, tuple[str, int]]:
    """Returns path in our tree -> (PyTorch key, axes of length 1 at its end).

    Covers all options of network `name`, and those of `paths` that are in a borrowed
    head.
    """
    model = models.create(name, num_classes=1, **models.family(name).tree_options()[0])
    result: dict[Path, tuple[str, int]] = {
        path: (model.key(path[1:], naming), 0)
        for path in paths
        if path[1] == "head" and projector.any_of(path[1:])
    }
    for chosen in models.family(name).tree_options():
        for key, entry in table(name, {"num_classes": 1, **chosen}, naming).items():
            ones = len(entry.torch_shape) - len(entry.shape)
            result[entry.path] = (key, ones)
    return result


def torch_shape(path: Path, shape: Shape, ones: int = 0) -> Shape:
    """Returns PyTorch's shape of the array at `path`: HWIO -> OIHW, IO -> OI.

    Arrays of no layer, such as position embeddings, have the same axes there.

    Args:
        path: in our tree.
        shape: in our layout.
        ones: number of axes of length 1 that PyTorch's array has at its end.
    """
    if _of_layer(path):
        shape = (*shape[:-3:-1], *shape[:-2])
    return (*shape, *(1,) * ones)


def to_flax(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Transposes OIHW -> HWIO or OI -> IO; inverts `to_torch`."""
    array = array.reshape(array.shape[: len(entry.shape)])  # without axes of length 1
    if not _of_layer(entry.path):
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_torch(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Transposes HWIO -> OIHW or IO -> OI, and adds PyTorch's axes of length 1."""
    if _of_layer(entry.path):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array).reshape(entry.torch_shape)


def _of_layer(path: Path) -> bool:
    return path[-1] in torch_names.LEAVES


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
) -> tuple[chain.Chain, dict[Path, Shape]]:
    """Makes a network; also returns the shape of every array by path."""
    model = models.create(name, **dict(options))
    variables = chain.variable_shapes(model)
    leaves: dict[Path, Any] = flax.traverse_util.flatten_dict(variables)
    return model, {path: leaf.shape for path, leaf in leaves.items()}
