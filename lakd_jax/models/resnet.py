"""Residual networks for small images (He et al. 2016, "Deep Residual Learning for
Image Recognition", section 4.2), and the four times wider ones of distillation papers.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.models import chain, layers


class Stem(nn.Module):
    """3x3 convolution, batch norm, ReLU; returns (activation, pre-activation)."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map images (B, H, W, 3) to two arrays (B, H, W, features)."""
        x = layers.conv(self.features, 3, 1, dtype=self.dtype, name="conv")(x)
        x = layers.batch_norm(train=train, dtype=self.dtype, name="bn")(x)
        return nn.relu(x), x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; returns (activation, pre-activation).

    Attributes:
        features: channels of both convolutions.
        stride: of the first convolution and the shortcut.
        shortcut: what the shortcut does where shapes change: "projection" (1x1
            convolution and batch norm) or "identity" (see `pad_shortcut`).
        dtype: compute type.
    """

    features: int
    stride: int
    shortcut: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map (B, H, W, C) to two arrays (B, H / stride, W / stride, features)."""
        conv = functools.partial(layers.conv, self.features, dtype=self.dtype)
        norm = functools.partial(layers.batch_norm, train=train, dtype=self.dtype)
        h = nn.relu(norm(name="bn1")(conv(3, self.stride, name="conv1")(x)))
        h = norm(name="bn2")(conv(3, 1, name="conv2")(h))
        if self.stride == 1 and x.shape[-1] == self.features:
            residual = x
        elif self.shortcut == "identity":
            residual = pad_shortcut(x, self.features, self.stride)
        else:
            residual = conv(1, self.stride, name="shortcut_conv")(x)
            residual = norm(name="shortcut_bn")(residual)
        preact = h + residual.astype(h.dtype)
        return nn.relu(preact), preact


def pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Shortcut without parameters: option A of He et al. 2016, section 3.3.

    Keeps every `stride`-th row and column of x (B, H, W, C) and fills up to `features`
    channels with zeros, half of them before and half after the old ones.
    """
    before = (features - x.shape[-1]) // 2
    after = features - x.shape[-1] - before
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))


class ResNet(chain.Chain, kw_only=True):
    """A chain of basic blocks; every stage after the first halves the image.

    Attributes:
        widths: channels of the stem, then of every stage.
        shortcut: see `BasicBlock`.
    """

    widths: tuple[int, ...]
    shortcut: str = "projection"

    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "shortcut": ("projection", "identity")
    }
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^linear\.", "fc."),
        (r"\.shortcut\.", ".downsample."),
    )

    @nn.nowrap
    def make_stem(self, name: str) -> Stem:
        """See `chain.Chain`."""
        return Stem(self.widths[0], self.dtype, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> BasicBlock:
        """See `chain.Chain`."""
        stride = 2 if stage > 0 and index == 0 else 1
        width = self.widths[stage + 1]
        return BasicBlock(width, stride, self.shortcut, self.dtype, name=name)

    @nn.nowrap
    def make_head(self, name: str) -> layers.Head:
        """See `chain.Chain`."""
        return layers.Head(self.num_classes, self.dtype, name=name)

    @nn.nowrap
    def torch_name(self, path: tuple[str, ...]) -> str:
        """("stage2", "block1", "shortcut_bn") -> "layer2.0.downsample.1"."""
        whole = {
            ("stem", "conv"): "conv1",
            ("stem", "bn"): "bn1",
            ("head", "dense"): "fc",
        }
        if path in whole:
            return whole[path]
        stage, block, layer = path
        shortcut = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}
        index = int(block.removeprefix("block")) - 1
        prefix = f"layer{stage.removeprefix('stage')}.{index}"
        return f"{prefix}.{shortcut.get(layer, layer)}"

    @classmethod
    def options_from_torch(
        cls, shapes: collections.abc.Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """See `chain.Chain`; no projection anywhere means identity shortcuts."""
        classifier = shapes.get("fc.weight", ())
        if len(classifier) != 2 or classifier[0] < 1:
            raise KeyError("fc.weight")
        projection = any(".downsample." in key for key in shapes)
        return {
            "num_classes": classifier[0],
            "shortcut": "projection" if projection else "identity",
        }


def _network(depth: int, widths: tuple[int, ...]) -> functools.partial:
    """The network with `depth` layers: three stages of (depth - 2) / 6 blocks."""
    sizes = ((depth - 2) // 6,) * 3
    return functools.partial(ResNet, stage_sizes=sizes, widths=widths)


NETWORKS = {
    f"resnet{depth}": _network(depth, (16, 16, 32, 64))
    for depth in (8, 14, 20, 32, 44, 56, 110)
} | {f"resnet{depth}x4": _network(depth, (32, 64, 128, 256)) for depth in (8, 32)}
