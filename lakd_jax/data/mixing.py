"""Mixup and CutMix: each image is mixed with its partner in the batch, labels alike.

Sources: Zhang et al., "mixup" (arXiv 1710.09412); Yun et al., "CutMix" (arXiv
1905.04899). They are timm's in mode "batch": the partner of image i is image B - 1 - i,
all images of a step have the same share, and if both kinds are on, each step takes one
of them with probability 1/2.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed.

    Attributes:
      mixup, cutmix: a of Beta(a, a), from which the share is drawn; 0 for never.
      classes: the number of classes.
      smoothing: the share of each label that all classes divide.
    """

    mixup: float
    cutmix: float
    classes: int
    smoothing: float = 0.0

    def __call__(
        self, key: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Mixes images (B, H, W, C) and labels (B,).

        Args:
          key: of this step.
          images: in 0..255, uint8 or float32.
          labels: integers.

        Returns:
          Images float32 in 0..255 and labels (B, classes) float32.
        """
        share = self.share(key, *images.shape[1:3])
        return mixed(images, share), self.soft_labels(labels, jnp.mean(share))

    def share(self, key: jax.Array, height: int, width: int) -> jax.Array:
        """Draws the share of each pixel (H, W) that an image keeps, float32."""
        which, beta, centre = jax.random.split(key, 3)
        cut = jax.random.bernoulli(which) if self.mixup else jnp.bool(True)
        cut &= self.cutmix > 0
        a = jnp.where(cut, self.cutmix, self.mixup)
        kept = jax.random.beta(beta, a, a)
        y, x = jax.random.randint(centre, (2,), 0, jnp.array([height, width]))
        outside = outside_box(height, width, kept, (y, x))
        return jnp.where(cut, outside, kept)

    def soft_labels(self, labels: jax.Array, kept: ArrayLike) -> jax.Array:
        """Returns the labels (B, classes) of images that keep the share `kept`."""
        least = self.smoothing / self.classes
        ours = jax.nn.one_hot(labels, self.classes, dtype=jnp.float32)
        ours = ours * (1 - self.smoothing) + least
        return mixed(ours, kept)


def mixed(x: jax.Array, kept: ArrayLike) -> jax.Array:
    """Returns kept * x + (1 - kept) * (x in reversed order), float32.

    Args:
      x: (B, classes), or (B, H, W, C).
      kept: a number, or (H, W).
    """
    x, kept = x.astype(jnp.float32), jnp.asarray(kept)
    if kept.ndim:
        kept = kept[None, :, :, None]
    return kept * x + (1 - kept) * x[::-1]


def outside_box(
    height: int, width: int, kept: ArrayLike, centre: tuple[ArrayLike, ArrayLike]
) -> jax.Array:
    """Returns (H, W) float32: 0 in a box of the area 1 - kept, 1 outside of it.

    The box is cut off at the borders of the image, so that its share may be smaller:
    what images keep is the mean of the result.

    Args:
      height: of the images.
      width: of the images.
      kept: the share of the area outside of the box.
      centre: of the box, (y, x).
    """
    side = jnp.sqrt(1 - jnp.asarray(kept))
    inside = jnp.ones((height, width), bool)
    for axis, (size, middle) in enumerate(zip((height, width), centre, strict=True)):
        length = jnp.floor(size * side).astype(jnp.int32)
        places = jax.lax.broadcasted_iota(jnp.int32, (height, width), axis)
        inside &= places >= middle - length // 2
        inside &= places < middle + (length + 1) // 2
    return 1 - inside.astype(jnp.float32)
