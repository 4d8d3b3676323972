"""The classifier of a network: finds it, reorders its classes, or removes it.

Its arrays are found by their shapes, which depend on the number of classes, so every
family's head (also an HME's, with its gate and norm, and a user's own) is handled
alike.
"""

from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import errors
from lakd_jax.models import chain

PyTree = Any
_Path = tuple[str, ...]


def class_axes(model: chain.Chain) -> dict[_Path, tuple[int, ...]]:
    """Returns the axes over classes of the arrays that have any, by path.

    The paths are those of the variables, ("params", "head", "dense", "kernel").
    """
    shapes, wider = (
        _shapes(model.clone(num_classes=count))
        for count in (model.num_classes, model.num_classes + 1)
    )
    axes = {
        path: tuple(np.flatnonzero(np.not_equal(shape, wider[path])).tolist())
        for path, shape in shapes.items()
    }
    return {path: found for path, found in axes.items() if found}


def _shapes(model: chain.Chain) -> dict[_Path, tuple[int, ...]]:
    leaves: dict[_Path, Any] = flax.traverse_util.flatten_dict(
        chain.variable_shapes(model)
    )
    return {path: leaf.shape for path, leaf in leaves.items()}


def reordered(model: chain.Chain, variables: PyTree, order: Sequence[int]) -> PyTree:
    """Returns the variables with the classes in another order.

    An axis that is a multiple of the classes long holds a block of neighbours per
    class, as in the norm of an HME's heads.

    Args:
        model: the network.
        variables: of the network, not folded.
        order: for every class of the result, its present index.

    Raises:
        errors.TeacherError: the network has an array that cannot be split by classes.
    """
    arrays: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables)
    for path, axes in class_axes(model).items():
        for axis in axes:
            arrays[path] = _take(arrays[path], axis, order, path)
    return flax.traverse_util.unflatten_dict(arrays)


def removed(model: chain.Chain, variables: PyTree) -> PyTree:
    """Returns the variables without the arrays that have an axis over classes."""
    arrays: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables)
    axes = class_axes(model)
    kept = {path: array for path, array in arrays.items() if path not in axes}
    return flax.traverse_util.unflatten_dict(kept)


def classifier(model: chain.Chain, variables: PyTree) -> tuple[Any, Any]:
    """Returns the matrix (D, classes) and the bias (classes,) that give the logits.

    They are those of the linear layer behind `Outputs.pooled` (B, D).

    Raises:
        errors.TeacherError: the head does not have exactly one such layer.
    """
    head: dict[_Path, Any] = flax.traverse_util.flatten_dict(
        variables["params"].get("head", {})
    )
    found = [
        path[:-1]
        for path, array in head.items()
        if path[-1] == "kernel"
        and array.ndim == 2
        and array.shape[-1] == model.num_classes
        and (*path[:-1], "bias") in head
    ]
    if len(found) != 1:
        raise errors.TeacherError(
            f"the head of {type(model).__name__} has {len(found)} linear layers to the "
            "classes, and the method reads the only one of a teacher: choose another "
            "teacher, or another method"
        )
    return head[*found[0], "kernel"], head[*found[0], "bias"]


def map_shape(model: chain.Chain, *sides: int) -> tuple[int, ...] | None:
    """Returns the shape (H, W, C) of `Outputs.last_map`; None if there is none.

    Args:
        model: the network.
        *sides: height and width of the images; none for `Chain.any_side`.
    """
    height, width = sides or (model.any_side,) * 2

    def run(images: jax.Array) -> jax.Array | None:
        outputs: Any = model.init_with_output(jax.random.key(0), images, train=False)[0]
        return outputs.last_map

    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    found = jax.eval_shape(run, images)
    return None if found is None else found.shape[1:]


def _take(array: Any, axis: int, order: Sequence[int], path: _Path) -> np.ndarray:
    array = np.moveaxis(np.asarray(array), axis, 0)
    if len(array) % len(order):
        raise errors.TeacherError(
            f"{'/'.join(path)} has an axis of {len(array)} for {len(order)} classes, "
            "so its classes cannot be reordered; use weights trained in the order of "
            "the data's classes."
        )
    blocks = array.reshape(len(order), -1, *array.shape[1:])[list(order)]
    array = np.moveaxis(blocks.reshape(array.shape), 0, axis)
    return np.ascontiguousarray(array)
