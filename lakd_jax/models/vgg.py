"""VGG with batch norm for small images (Simonyan and Zisserman, arXiv 1409.1556).

As distillation papers have it: five groups of 3x3 convolutions, average pooling and
one linear layer. The first group is the stem. Max pooling belongs to the first unit
after it, so that features are recorded unpooled.
"""

import collections.abc
import functools
from typing import Any

import jax
from flax import linen as nn

from lakd_jax.models import chain, layers

# PyTorch's Linear weights, with this deviation and no bias at the start.
_dense_init = nn.initializers.normal(0.01)


class Stem(nn.Module):
    """The first group: 3x3 convolutions, each with batch norm and ReLU.

    Attributes:
        widths: channels of the convolutions.
        style: of the network.
    """

    widths: tuple[int, ...]
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map images (B, H, W, 3) to (B, H, W, widths[-1]), twice the same."""
        for index, width in enumerate(self.widths, 1):
            layer = functools.partial(layers.conv_norm, x, width, 3, 1, self.style)
            x = nn.relu(layer(train=train, name=f"conv{index}", bias=True))
        return x, x


class Block(nn.Module):
    """3x3 convolution, batch norm, ReLU; returns (activation, pre-activation).

    Attributes:
        features: channels of the convolution.
        pool: "always", "never", or "large": 2x2 max pooling of the input, where that
            is 8x8 or more with "large".
        style: of the network.
    """

    features: int
    pool: str
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map (B, H, W, C) to two (B, H, W, features), or half as high and wide."""
        if self.pool == "always" or (self.pool == "large" and x.shape[1] >= 8):
            x = layers.max_pool(x, 2, 2, 0)
        layer = functools.partial(layers.conv_norm, x, self.features, 3, 1, self.style)
        preact = layer(train=train, name="conv", bias=True, gated=True)
        return nn.relu(preact), preact


class VGG(chain.Chain, kw_only=True):
    """Four stages behind the stem, of one block a convolution.

    The last stage pools its input for images of 64x64 or more only: at 32x32 the
    maps of its predecessor are 4x4 already.

    Attributes:
        stem_widths: channels of the stem's convolutions.
        widths: channels of each stage.
    """

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
    def make_head(self, name: str) -> layers.Head:
        """See `chain.Chain`."""
        head = functools.partial(layers.Head, kernel_init=_dense_init, zero_bias=True)
        return head(self.num_classes, self.style, name=name)

    @nn.nowrap
    def torch_name(self, path: tuple[str, ...]) -> str:
        """("stage2", "block1", "bn") -> "block2.1": norms follow convolutions."""
        if path[0] == "head":
            return "classifier"
        if path[0] == "stem":
            group, layer = 0, path[1]
            place = int(layer[-1]) - 1
        else:
            group, layer = int(path[0].removeprefix("stage")), path[2]
            place = int(path[1].removeprefix("block")) - 1
        # Convolution, norm, ReLU, convolution, ...
        return f"block{group}.{3 * place + layer.startswith('bn')}"

    @classmethod
    def options_from_torch(
        cls, shapes: collections.abc.Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """See `chain.Chain`."""
        return {"num_classes": chain.classes_of(shapes, "classifier.weight")}


# Convolutions of the stem, then of each stage.
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
