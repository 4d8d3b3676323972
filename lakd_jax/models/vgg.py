"""VGG with batch norm for small images (Simonyan and Zisserman, arXiv 1409.1556).

In the variant of distillation papers: five groups of 3x3 convolutions, average pooling
and one linear layer. The first group is the stem. Max pooling belongs to the unit that
follows it, so that features are recorded unpooled.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import jax
from flax import linen as nn

from lakd_jax.models import chain, layers


class Stem(nn.Module):
    """The first group: 3x3 convolutions, each with batch norm and ReLU.

    Attributes:
        widths: channels of the convolutions.
        style: settings shared by the network's layers.
    """

    widths: tuple[int, ...]
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps images (B, H, W, 3) to two equal arrays (B, H, W, widths[-1])."""
        for index, width in enumerate(self.widths, 1):
            layer = functools.partial(layers.conv_norm, x, width, 3, 1, self.style)
            x = nn.relu(layer(train=train, name=f"conv{index}", bias=True))
        return x, x


class Block(nn.Module):
    """3x3 convolution, batch norm and ReLU; returns (activation, pre-activation).

    Attributes:
        features: channels of the convolution.
        pool: when the input is max-pooled (2x2): "always", "never", or "large", which
            means if it is at least 8x8.
        style: settings shared by the network's layers.
    """

    features: int
    pool: str
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two arrays (B, H, W, features), halved if pooled."""
        if self.pool == "always" or (self.pool == "large" and x.shape[1] >= 8):
            x = layers.max_pool(x, 2, 2, 0)
        layer = functools.partial(layers.conv_norm, x, self.features, 3, 1, self.style)
        preact = layer(train=train, name="conv", bias=True, gated=True)
        return nn.relu(preact), preact


def _name(group: int, index: int, layer: str) -> str:
    """Returns PyTorch's name: one list of convolution, norm, ReLU, ... per group."""
    return f"block{group}.{3 * index + layer.startswith('bn')}"


class VGG(chain.Chain, kw_only=True):
    """A stem and four stages, with one block per convolution.

    The last stage pools its input only for images of 64x64 or more: at 32x32 the
    feature maps of the stage before are already 4x4.

    Attributes:
        stem_widths: channels of the stem's convolutions.
        widths: channels of each stage.
    """

    HEAD: ClassVar[collections.abc.Mapping[str, Any]] = {
        "kernel_init": layers.small_normal,
        "zero_bias": True,
    }
    CLASSIFIER: ClassVar[str] = "classifier"
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {
        ("stem", f"{kind}{i + 1}"): _name(0, i, kind)
        for kind in ("conv", "bn")
        for i in range(2)
    }

    stem_widths: tuple[int, ...]
    widths: tuple[int, ...] = (128, 256, 512, 512)

    @nn.nowrap
    def make_stem(self, name: str) -> Stem:
        """See `chain.Chain`."""
        return Stem(self.stem_widths, self.style, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> Block:
        """See `chain.Chain`."""
        last = stage == len(self.widths) - 1
        pool = "never" if index else "large" if last else "always"
        return Block(self.widths[stage], pool, self.style, name=name)

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (1, 0, "bn") to "block2.1"."""
        return _name(stage + 1, index, layer)


# Number of convolutions in the stem, then in each stage.
_SIZES = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}

NETWORKS = {
    f"vgg{depth}": functools.partial(
        VGG, stem_widths=(64,) * sizes[0], stage_sizes=sizes[1:]
    )
    for depth, sizes in _SIZES.items()
}
