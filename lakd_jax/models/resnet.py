"""Residual networks (He et al. 2016, "Deep Residual Learning for Image Recognition").

Three-stage networks for small images (section 4.2) and the four times wider ones of
distillation papers; four-stage networks for small images, with a 3x3 stem; and those
for ImageNet (section 4.1), with the stride in the bottleneck's 3x3 convolution.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.models import chain, layers

Conv = collections.abc.Callable[..., jax.Array]  # a partial of `layers.conv_norm`


class _Residual(nn.Module):
    """Convolutions with a shortcut; returns (activation, pre-activation).

    Attributes:
        features: channels of the convolutions (see the subclass for the last).
        stride: of the shortcut and one of the convolutions.
        shortcut: kind of shortcut where shapes change: "projection" (1x1 convolution
            and batch norm) or "identity" (see `pad_shortcut`).
        style: settings shared by the network's layers.
        pool_input: whether 3x3 max pooling of stride 2 comes first, as in the first
            block of ImageNet's networks: their stem's feature is recorded unpooled.
    """

    features: int
    stride: int
    shortcut: str
    style: layers.Style
    pool_input: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two arrays (B, H / stride, W / stride, C')."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        x = layers.max_pool(x, 3, 2, 1) if self.pool_input else x
        h = self.branch(x, functools.partial(conv, gated=True))
        if self.stride == 1 and x.shape[-1] == h.shape[-1]:
            residual = x
        elif self.shortcut == "identity":
            residual = pad_shortcut(x, h.shape[-1], self.stride)
        else:
            residual = conv(x, h.shape[-1], 1, self.stride, name="shortcut_conv")
        preact = h + residual.astype(h.dtype)
        return nn.relu(preact), preact

    @nn.nowrap
    def branch(self, x: jax.Array, conv: Conv) -> jax.Array:
        """Applies the convolutions, the last without its ReLU."""
        raise NotImplementedError


class BasicBlock(_Residual):
    """Two 3x3 convolutions; the first has the stride."""

    @nn.nowrap
    def branch(self, x: jax.Array, conv: Conv) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
        h = nn.relu(conv(x, self.features, 3, self.stride, name="conv1"))
        return conv(h, self.features, 3, 1, name="conv2")


class Bottleneck(_Residual):
    """1x1, 3x3 and 1x1 convolutions; the second has the stride."""

    @nn.nowrap
    def branch(self, x: jax.Array, conv: Conv) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, 4 features)."""
        h = nn.relu(conv(x, self.features, 1, 1, name="conv1"))
        h = nn.relu(conv(h, self.features, 3, self.stride, name="conv2"))
        return conv(h, 4 * self.features, 1, 1, name="conv3")


def pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Computes the shortcut without parameters (He et al. 2016, section 3.3, option A).

    Keeps every `stride`-th row and column of x (B, H, W, C) and pads its channels to
    `features` with zeros, half of them before and half after the existing ones.
    """
    before = (features - x.shape[-1]) // 2
    after = features - x.shape[-1] - before
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))


class CifarResNet(chain.Chain, kw_only=True):
    """A chain of residual blocks; every stage after the first halves the resolution.

    Attributes:
        widths: channels of the stem, then `features` of the blocks of every stage.
        block: `BasicBlock` or `Bottleneck`.
        shortcut: see `BasicBlock`.
    """

    widths: tuple[int, ...]
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    shortcut: str = "projection"

    STEM: ClassVar[tuple[int, int]] = (3, 1)  # kernel and stride of the stem
    POOLED: ClassVar[bool] = False  # whether the first block pools its input
    CLASSIFIER: ClassVar[str] = "linear"
    SHORTCUT: ClassVar[str] = "shortcut"  # its name in PyTorch
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^fc\.", "linear."),
        (r"\.downsample\.", ".shortcut."),
    )

    @nn.nowrap
    def make_stem(self, name: str) -> layers.Stem:
        """See `chain.Chain`."""
        return layers.Stem(self.widths[0], *self.STEM, self.style, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> nn.Module:
        """See `chain.Chain`."""
        stride = 2 if stage > 0 and index == 0 else 1
        width = self.widths[stage + 1]
        pool = self.POOLED and stage == 0 and index == 0
        return self.block(width, stride, self.shortcut, self.style, pool, name=name)

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (1, 0, "shortcut_bn") to "layer2.0.shortcut.1"."""
        shortcut = {
            "shortcut_conv": f"{self.SHORTCUT}.0",
            "shortcut_bn": f"{self.SHORTCUT}.1",
        }
        return f"layer{stage + 1}.{index}.{shortcut.get(layer, layer)}"


class ResNet(CifarResNet, kw_only=True):
    """The three-stage networks, with either kind of shortcut."""

    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "shortcut": ("projection", "identity")
    }
    CLASSIFIER: ClassVar[str] = "fc"
    SHORTCUT: ClassVar[str] = "downsample"
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^linear\.", "fc."),
        (r"\.shortcut\.", ".downsample."),
    )

    @classmethod
    def options_from_torch(
        cls, shapes: collections.abc.Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """See `chain.Chain`; no projection anywhere means identity shortcuts."""
        projection = any(".downsample." in key for key in shapes)
        shortcut = "projection" if projection else "identity"
        return {**super().options_from_torch(shapes), "shortcut": shortcut}


class ImageNetResNet(CifarResNet, kw_only=True):
    """The four-stage networks for images of 224x224."""

    IMAGE_SIZE: ClassVar[int] = 224
    STEM: ClassVar[tuple[int, int]] = (7, 2)
    POOLED: ClassVar[bool] = True
    CLASSIFIER: ClassVar[str] = "fc"
    SHORTCUT: ClassVar[str] = "downsample"
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = ResNet.TORCH_ALIASES


def _three_stages(depth: int, widths: tuple[int, ...]) -> functools.partial:
    """Returns the network of `depth` layers: three stages of (depth - 2) / 6 blocks."""
    sizes = ((depth - 2) // 6,) * 3
    # As in AFD: in the deepest network only every second block is compared.
    tap_every = 2 if depth == 110 else 1
    return functools.partial(
        ResNet, stage_sizes=sizes, widths=widths, tap_every=tap_every
    )


_FOUR_STAGES = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _four_stages(family: type[CifarResNet], depth: int) -> functools.partial:
    block, sizes = _FOUR_STAGES[depth]
    widths = (64, 64, 128, 256, 512)
    return functools.partial(family, stage_sizes=sizes, widths=widths, block=block)


NETWORKS = (
    {
        f"resnet{depth}": _three_stages(depth, (16, 16, 32, 64))
        for depth in (8, 14, 20, 32, 44, 56, 110)
    }
    | {f"resnet{d}x4": _three_stages(d, (32, 64, 128, 256)) for d in (8, 32)}
    | {f"cifar_resnet{d}": _four_stages(CifarResNet, d) for d in (18, 34, 50)}
    | {f"resnet{d}": _four_stages(ImageNetResNet, d) for d in _FOUR_STAGES}
)
