"""The image sizes that a network takes.

Poolings shrink images below the least size to nothing; position embeddings fix it.
"""

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


def require_side(model: Any, shape: tuple[int, ...]) -> None:
    """Raises DataError unless images (B, H, W, 3) are as large as a network takes."""
    from lakd_jax import models  # which imports the module that calls this

    height, width = shape[1:3]
    side = model.fixed_side
    if (height, width) != (side, side):
        name = models.name_of(model.clone(parent=None))
        found = max(height, width)
        raise errors.DataError(
            f"this {name} was made for images of {side}x{side} pixels, these are "
            f"{height}x{width}: make it with image_size={found}, or resize them (set "
            f"the image_size of student or teacher to {side})."
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
