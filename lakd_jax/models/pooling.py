"""Maps brought to another size, as PyTorch does it."""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp


def adaptive_pool(
    x: jax.Array, height: int, width: int, reduce: Callable[..., jax.Array]
) -> jax.Array:
    """Pools to `height` x `width` cells that cover the map, any sizes.

    Cell i of n over N pixels is floor(i N / n) .. ceil((i + 1) N / n) - 1, as in
    PyTorch's AdaptiveAvgPool2d; neighbours overlap where n does not divide N. With
    more cells than pixels, pixels are repeated.

    Args:
      x: (B, H, W, C).
      height: rows of the result.
      width: columns of the result.
      reduce: `jnp.mean` or `jnp.max`.

    Returns:
      (B, height, width, C).
    """
    if x.shape[1] % height == 0 and x.shape[2] % width == 0:
        pattern = "b (h rows) (w columns) c -> b h w c"
        return einops.reduce(x, pattern, reduce, h=height, w=width)
    if height % x.shape[1] == 0 and width % x.shape[2] == 0:
        return resize_nearest(x, height, width)  # every cell is one pixel
    for axis, cells in ((1, height), (2, width)):
        size = x.shape[axis]
        edges = [(i * size // cells, -((i + 1) * -size // cells)) for i in range(cells)]
        pieces = [jax.lax.slice_in_dim(x, lo, hi, axis=axis) for lo, hi in edges]
        pooled = [reduce(piece, axis=axis, keepdims=True) for piece in pieces]
        x = jnp.concatenate(pooled, axis=axis)
    return x


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """(B, H, W, C) enlarged to (B, height, width, C) by repeating values.

    Pixel y of n takes pixel floor(y H / n), as in PyTorch's nearest mode.
    """
    rows = jnp.arange(height) * x.shape[1] // height
    columns = jnp.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]
