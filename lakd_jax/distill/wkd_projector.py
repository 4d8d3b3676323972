"""The projector of a student's map in front of WKD-F."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.distill.base import adapter
from lakd_jax.models import layers

KINDS = ("conv1x1", "bottleneck")
_BOTTLENECK = 256


def projected_size(
    size: Sequence[int], target: Sequence[int], kind: str
) -> tuple[int, ...]:
    """Returns height and width that a `Projector` gives a student's map of `size`.

    Those of the teacher's, `target`, except that a bottleneck keeps them, and so does a
    map that is smaller without being half as large: no public projector has this case.
    """
    if kind == "bottleneck":
        return tuple(size)
    if all(2 * ours == theirs for ours, theirs in zip(size, target, strict=True)):
        return tuple(target)
    return tuple(map(min, size, target))


class Projector(nn.Module):
    """From the student's map to the teacher's channels and, if possible, size.

    Attributes:
      features: the teacher's channels.
      size: of its map.
      kind: `conv1x1`, which is a larger convolution where the student's map is larger,
        and a transposed one where it is half as large, or `bottleneck`: 1x1, 3x3, 1x1
        without anything between them. Batch norm and ReLU follow.
    """

    features: int
    size: tuple[int, int]
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', features) float32."""
        x = x.astype(jnp.float32)
        start: dict[str, Any] = {"kernel_init": layers.uniform_fan_in}
        if self.kind == "bottleneck":
            x = nn.Conv(_BOTTLENECK, (1, 1), name="conv1", **start)(x)
            x = nn.Conv(_BOTTLENECK, (3, 3), name="conv2", **start)(x)
            x = nn.Conv(self.features, (1, 1), name="conv3", **start)(x)
        else:
            x = self._resizing(x.shape[1:3], start)(x)
        return nn.relu(adapter.batch_norm(train=train, name="bn")(x))

    def _resizing(self, size: Sequence[int], start: dict[str, Any]) -> nn.Module:
        """Returns the convolution to the teacher's size; 1x1 where none leads there."""
        options: dict[str, Any] = {"name": "conv", **start}
        pairs = list(zip(size, self.size, strict=True))
        if all(2 * ours == theirs for ours, theirs in pairs):
            options |= {"strides": (2, 2), "padding": "SAME"}
            return nn.ConvTranspose(self.features, (4, 4), **options)
        if all(ours == 2 * theirs for ours, theirs in pairs):
            options |= {"strides": (2, 2), "padding": 1}
            return nn.Conv(self.features, (3, 3), **options)
        kernel = tuple(max(ours - theirs + 1, 1) for ours, theirs in pairs)
        return nn.Conv(self.features, kernel, padding="VALID", **options)
