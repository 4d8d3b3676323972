"""Random crop, flip and normalisation as pure functions, for use under jit.

The augmentation of an example depends only on (key, epoch, id): not on its batch,
its position in it, or the number of devices.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def augment(
    key: jax.Array,
    images_u8: jax.Array,
    ids: jax.Array,
    epoch: ArrayLike,
    *,
    pad: int,
    flip: bool,
) -> jax.Array:
    """Takes a random crop of each zero-padded image and mirrors half of them.

    The standard CIFAR augmentation (He et al., arXiv 1512.03385, section 4.2:
    pad 4). Padding is black, since it precedes the normalisation.

    Args:
      key: the run's augmentation key, threefry (JAX's default): under `vmap`
        the bits of rbg generators depend on the batch.
      images_u8: (B, H, W, C) uint8.
      ids: (B,) integers, each example's id in the training split.
      epoch: number of the pass over the data, from 0; may be traced.
      pad: pixels of padding on every side; 0 disables the crop.
      flip: whether to mirror left and right with probability 1/2.

    Returns:
      (B, H, W, C) uint8.
    """
    if not pad and not flip:
        return images_u8
    words = _random_words(jax.random.fold_in(key, epoch), ids)
    if pad:
        images_u8 = _crop(images_u8, words[:, 0], pad)
    if flip:
        chosen = (words[:, 1] >> 31).astype(bool)
        mirrored = images_u8[:, :, ::-1]
        images_u8 = jnp.where(chosen[:, None, None, None], mirrored, images_u8)
    return images_u8


def resize(images: jax.Array, size: int) -> jax.Array:
    """Resizes images to squares: bilinear, with averaging when they shrink.

    Args:
      images: (B, H, W, C) uint8 or float.
      size: new height and width; 0 returns the images unchanged.

    Returns:
      (B, size, size, C) float32 in the units of `images`, or `images`.
    """
    batch, height, width, channels = images.shape
    if not size or (height, width) == (size, size):
        return images
    shape = (batch, size, size, channels)
    return jax.image.resize(images.astype(jnp.float32), shape, "bilinear")


def normalise(
    images: jax.Array,
    mean: Sequence[float] | ArrayLike,
    std: Sequence[float] | ArrayLike,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns (image / 255 - mean) / std, computed in float32.

    Args:
      images: (B, H, W, C) in the range 0 to 255, uint8 or float32.
      mean: (C,) for images in the range 0 to 1.
      std: (C,) in the same units, positive.
      dtype: of the result.
    """
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None, :] for x in (mean, std))
    unit = images.astype(jnp.float32) / 255
    return ((unit - mean) / std).astype(dtype)


def _random_words(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns (B, 2) uint32 words, one threefry block per example."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
    return jax.vmap(lambda k: jax.random.bits(k, (2,), jnp.uint32))(keys)


def _crop(images: jax.Array, words: jax.Array, pad: int) -> jax.Array:
    """Returns (B, H, W, C) windows of the padded images at random offsets."""
    # Both offsets come from one word: 2**32 is so large that the modulo favours
    # no offset by more than one part in 10**7.
    offsets = 2 * pad + 1
    top = (words % offsets).astype(jnp.int32)
    left = (words // offsets % offsets).astype(jnp.int32)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    window = functools.partial(jax.lax.dynamic_slice, slice_sizes=images.shape[1:])
    return jax.vmap(lambda image, y, x: window(image, (y, x, 0)))(padded, top, left)
