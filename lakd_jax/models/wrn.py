"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146).

Pre-activation blocks: a block's output, which is the feature, is the signed sum before
the next block's batch norm and ReLU. The recorded pre-activation is that sum after the
next unit's batch norm.
"""

import collections.abc
import functools
import re
from typing import Any, ClassVar

import jax
from flax import linen as nn

from lakd_jax.models import chain, layers


class Stem(nn.Module):
    """A 3x3 convolution; its norm and ReLU belong to the first block."""

    features: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps images (B, H, W, 3) to two equal arrays (B, H, W, features)."""
        x = layers.conv(self.features, 3, 1, self.style, name="conv")(x)
        return x, x


class Block(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3; the shortcut is projected if widths differ.

    A projected shortcut starts after the first ReLU, any other at the input.

    Attributes:
        features: channels of both convolutions.
        stride: of the first convolution and the shortcut.
        style: settings shared by the network's layers.
    """

    features: int
    stride: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two equal (B, H / stride, W / stride, features)."""
        style, width = self.style, self.features
        h = nn.relu(layers.norm(style, train=train, name="entry_bn")(x))
        if x.shape[-1] == width:
            residual = x
        else:
            shortcut = layers.conv(width, 1, self.stride, style, name="shortcut")
            residual = shortcut(h)
        conv = functools.partial(layers.conv_norm, style=style, train=train)
        h = nn.relu(conv(h, width, 3, self.stride, name="conv1", gated=True))
        h = layers.conv(width, 3, 1, style, name="conv2", gated=True)(h)
        h = h + residual.astype(h.dtype)
        return h, h


class WideResNet(chain.Chain, kw_only=True):
    """Three stages; each after the first halves the resolution.

    Attributes:
        widen: factor on the stages' widths 16, 32 and 64; the stem has 16 channels.
    """

    widen: int

    PREACTIVATION: ClassVar[bool] = True
    HEAD: ClassVar[collections.abc.Mapping[str, Any]] = {
        "entry_norm": True,
        "zero_bias": True,
    }
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {
        ("stem", "conv"): "conv1",
        ("head", "entry_bn"): "bn1",
    }
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^linear\.", "fc."),
        (r"^layer(\d)\.layer\.", r"block\1.layer."),
    )

    @nn.nowrap
    def make_stem(self, name: str) -> Stem:
        """See `chain.Chain`."""
        return Stem(16, self.style, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> Block:
        """See `chain.Chain`."""
        stride = 2 if stage > 0 and index == 0 else 1
        return Block(16 * self.widen * 2**stage, stride, self.style, name=name)

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (1, 0, "conv1") to "block2.layer.0.conv1"."""
        renamed = {"entry_bn": "bn1", "bn1": "bn2", "shortcut": "convShortcut"}
        return f"block{stage + 1}.layer.{index}.{renamed.get(layer, layer)}"


def from_name(name: str) -> functools.partial | None:
    """Returns the network "wrn_D_K" of depth D and width factor K; else None.

    Raises ValueError if D is not a depth that three equal stages can have.
    """
    match = re.fullmatch(r"wrn_([1-9]\d*)_([1-9]\d*)", name)
    if not match:
        return None
    depth, widen = map(int, match.groups())
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(
            f"network is {name!r}: the depth of a wide ResNet is 6n + 4 (10, 16, 22, "
            f"28, 34, 40, ...), not {depth}"
        )
    sizes = ((depth - 4) // 6,) * 3
    return functools.partial(WideResNet, stage_sizes=sizes, widen=widen)


NETWORKS = {
    name: from_name(name)
    for name in ("wrn_16_1", "wrn_16_2", "wrn_28_2", "wrn_40_1", "wrn_40_2")
}
