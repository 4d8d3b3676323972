"""The least image size of a network: poolings shrink smaller images to nothing."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax import errors


def too_small(model: Any, shape: tuple[int, ...]) -> errors.DataError:
    """Returns the error for images (B, H, W, 3) of which a network leaves no pixel."""
    from lakd_jax import models  # which imports the module that calls this

    height, width = shape[1:3]
    least = least_side(model.clone(parent=None), min(height, width) + 1)
    return errors.DataError(
        f"{models.name_of(model)} needs images of at least {least}x{least} pixels, "
        f"these are {height}x{width}: set data.image_size, or the image_size of "
        f"student or teacher, to {least} or more, or take another network."
    )


def least_side(model: Any, side: int) -> int:
    """Returns the least image size from `side` on of which the network leaves a pixel.

    Computes shapes only.
    """

    last = model.unit_names[-1]

    def blocks(images: jax.Array) -> Any:
        key = jax.random.key(0)
        return model.init_with_output(key, images, train=False, until=last)[0].blocks

    def fits(side: int) -> bool:
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        shapes = jax.tree.leaves(jax.eval_shape(blocks, images))
        return not any(0 in x.shape for x in shapes)

    return next(filter(fits, itertools.count(side)))
