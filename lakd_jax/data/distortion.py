"""What changes the colours and shapes of a training image, after crop and mirror.

Like `augment.augment` it depends on (key, view, id) alone, so that a teacher's stored
outputs stay valid.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lakd_jax.data import operations
from lakd_jax.data import policy as policy_lib

_JITTER, _POLICY, _ERASE = 2, 3, 4  # 0 and 1 are the blocks of `augment.augment`
_AREA = (0.02, 1 / 3)  # of what is erased, as a share of the image
_RATIO = (0.3, 1 / 0.3)  # of its height to its width
_TRIES = 10  # at a box that fits into the image


@dataclasses.dataclass(frozen=True)
class Distortion:
    """Colour jitter, a policy and random erasing, in this order.

    Attributes:
      jitter: the most by which brightness, contrast and saturation change, as a share.
      policy: see `policy`; "" for none.
      erase: the probability that a box is erased.
      mean, std: of the pixels in 0..1; noise in erased boxes is that once normalised.
    """

    jitter: float = 0.0
    policy: str = ""
    erase: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return bool(self.jitter or self.policy or self.erase)

    def __call__(
        self, key: jax.Array, images: jax.Array, ids: jax.Array, view: ArrayLike
    ) -> jax.Array:
        """Distorts a batch.

        Args:
          key: the run's augmentation key, see `augment.augment`.
          images: (B, H, W, 3) uint8.
          ids: (B,) integers, each example's id in the training split.
          view: number of the view; may be traced.

        Returns:
          (B, H, W, 3), uint8, or float32 in the same units where boxes are erased,
          whose noise exceeds the range of pixels.
        """
        if not self.active:
            return images
        key = jax.random.fold_in(key, view)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
        return jax.vmap(self._one)(keys, images)

    def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
        keys = {n: jax.random.fold_in(key, n) for n in (_JITTER, _POLICY, _ERASE)}
        if self.jitter:
            image = jittered(keys[_JITTER], image, self.jitter)
        if self.policy:
            image = policy_lib.create(self.policy, self.mean)(keys[_POLICY], image)
        if self.erase:
            image = erased(keys[_ERASE], image, self.erase, self.mean, self.std)
        return image


def jittered(key: jax.Array, image: jax.Array, most: float) -> jax.Array:
    """Changes brightness, contrast and saturation, in a random order.

    As torchvision's ColorJitter: by factors from 1 - most (at least 0) to 1 + most.

    Args:
      key: of this image.
      image: (H, W, 3) uint8.
      most: the largest change.

    Returns:
      (H, W, 3) uint8.
    """
    order, factor = jax.random.split(key)
    low = max(1 - most, 0)
    factors = jax.random.uniform(factor, (3,), minval=low, maxval=1 + most)
    kinds = (operations.black, operations.grey, operations.mean_grey)
    for kind in jax.random.permutation(order, 3):
        degenerate = jnp.stack([function(image) for function in kinds])[kind]
        image = operations.blend_with(degenerate, image, factors[kind])
    return image


def erased(
    key: jax.Array,
    image: jax.Array,
    chance: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> jax.Array:
    """Replaces a random box by noise, which is Normal(0, 1) once it is normalised.

    Zhong et al., "Random Erasing" (arXiv 1708.04896), in the form of timm's mode
    "pixel": a box of 2 % to a third of the area.

    Args:
      key: of this image.
      image: (H, W, 3) uint8.
      chance: the probability that there is a box.
      mean, std: of the pixels in 0..1.

    Returns:
      (H, W, 3) float32 in 0..255, without bounds in the box.
    """
    wanted, box, noise = jax.random.split(key, 3)
    inside = box_in(box, *image.shape[:2])
    inside &= jax.random.bernoulli(wanted, chance)
    pixels = jax.random.normal(noise, image.shape)
    pixels = jnp.array([[mean]]) + jnp.array([[std]]) * pixels
    return jnp.where(inside[..., None], 255 * pixels, image.astype(jnp.float32))


def box_in(key: jax.Array, height: int, width: int) -> jax.Array:
    """Draws a box that is smaller than the image in both directions.

    Returns:
      (H, W) bool, which pixels are inside; none if ten boxes in a row did not fit.
    """
    area, ratio, place = jax.random.split(key, 3)
    low, high = (height * width * share for share in _AREA)
    areas = jax.random.uniform(area, (_TRIES,), minval=low, maxval=high)
    logs = jnp.log(jnp.array(_RATIO))
    ratios = jax.random.uniform(ratio, (_TRIES,), minval=logs[0], maxval=logs[1])
    heights = jnp.round(jnp.sqrt(areas * jnp.exp(ratios)))
    widths = jnp.round(jnp.sqrt(areas / jnp.exp(ratios)))
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    inside = jnp.any(fits) & jnp.ones((height, width), bool)
    places = jax.random.uniform(place, (2,))
    sizes = (height, heights[first]), (width, widths[first])
    for axis, ((whole, size), at) in enumerate(zip(sizes, places, strict=True)):
        start = jnp.floor(at * (whole - size + 1))
        pixel = jax.lax.broadcasted_iota(jnp.float32, (height, width), axis)
        inside &= (pixel >= start) & (pixel < start + size)
    return inside
