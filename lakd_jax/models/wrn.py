"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146).

Pre-activation blocks: a block's output is the signed sum before the next block's batch
norm and ReLU, and that is the feature. The pre-activation on record is what the next
unit's batch norm makes of it.
"""

import collections.abc
import functools
import re
from typing import Any, ClassVar

import jax
from flax import linen as nn

from lakd_jax.models import chain, layers


class Stem(nn.Module):
    """3x3 convolution alone; its norm and ReLU belong to the first block."""

    features: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map images (B, H, W, 3) to (B, H, W, features), twice the same."""
        x = layers.conv(self.features, 3, 1, self.style, name="conv")(x)
        return x, x


class Block(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3; the shortcut is projected if widths differ.

    Where it is projected, it starts behind the first ReLU, else at the input.

    Attributes:
        features: channels of both convolutions.
        stride: of the first convolution and the shortcut.
        style: of the network.
    """

    features: int
    stride: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map (B, H, W, C) to (B, H / stride, W / stride, features), twice the same."""
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
    """Three stages; each after the first halves the image.

    Attributes:
        widen: factor on the widths 16, 32, 64 of the stages; the stem has 16.
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
        """(1, 0, "conv1") -> "block2.layer.0.conv1"."""
        own = {"entry_bn": "bn1", "bn1": "bn2", "shortcut": "convShortcut"}
        return f"block{stage + 1}.layer.{index}.{own.get(layer, layer)}"


def from_name(name: str) -> functools.partial | None:
    """The network "wrn_D_K" of depth D and width factor K; None for other names.

    Raises ValueError where three stages of blocks cannot make up D.
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
