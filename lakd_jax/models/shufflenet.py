"""ShuffleNets for small images: version 1 (arXiv 1707.01083) and 2 (1807.11164).

In the variant of distillation papers: a 1x1 stem without stride or pooling, and three
stages whose first blocks halve the resolution.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.models import chain, layers

_GROUPS = 3  # in the 1x1 convolutions of version 1
_STEM = 24  # channels of the stem


class GroupedBlock(nn.Module):
    """The block of version 1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    With stride 1 the input is added; with stride 2 it is average-pooled (3x3) and
    concatenated along the channels. Returns (activation, pre-activation).

    Attributes:
        features: number of output channels.
        stride: 1 or 2.
        style: settings shared by the network's layers.
    """

    features: int
    stride: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two arrays (B, H / stride, W / stride, features)."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        pointwise = functools.partial(conv, kernel=1, stride=1, gated=True)
        added = self.features - (x.shape[-1] if self.stride == 2 else 0)
        groups = 1 if x.shape[-1] == _STEM else _GROUPS
        middle = added // 4
        h = nn.relu(pointwise(x, middle, groups=groups, name="conv1"))
        h = layers.shuffle(h, groups)
        h = nn.relu(conv(h, middle, 3, self.stride, groups=middle, name="conv2"))
        h = pointwise(h, added, groups=_GROUPS, name="conv3")
        x = x.astype(h.dtype)
        if self.stride == 2:
            # Padding counts as zeros in the mean, as in PyTorch.
            pooled = nn.avg_pool(
                x, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))
            )
            preact = jnp.concatenate([h, pooled], -1)
        else:
            preact = h + x
        return nn.relu(preact), preact


class SplitBlock(nn.Module):
    """The block of version 2: three convolutions on one half of the channels.

    The other half is left as it is. The pre-activation is the two halves concatenated;
    the activation is shuffled as well.

    Attributes:
        style: settings shared by the network's layers.
    """

    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two arrays of the same shape."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        pointwise = functools.partial(conv, kernel=1, stride=1, gated=True)
        identity, h = jnp.split(x, 2, axis=-1)
        width = h.shape[-1]
        h = nn.relu(pointwise(h, width, name="conv1"))
        h = conv(h, width, 3, 1, groups=width, name="conv2")
        h = pointwise(h, width, name="conv3")
        identity = identity.astype(h.dtype)
        joined = jnp.concatenate([identity, nn.relu(h)], -1)
        return layers.shuffle(joined, 2), jnp.concatenate([identity, h], -1)


class DownBlock(nn.Module):
    """The first block of version 2's stages: two branches of stride 2, concatenated.

    Attributes:
        features: number of output channels.
        style: settings shared by the network's layers.
    """

    features: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two arrays (B, H / 2, W / 2, features)."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        pointwise = functools.partial(conv, kernel=1, stride=1, gated=True)
        width, half = x.shape[-1], self.features // 2
        left = conv(x, width, 3, 2, groups=width, name="conv1")
        left = pointwise(left, half, name="conv2")
        right = nn.relu(pointwise(x, half, name="conv3"))
        right = conv(right, half, 3, 2, groups=half, name="conv4")
        right = pointwise(right, half, name="conv5")
        preact = jnp.concatenate([left, right], -1)
        return layers.shuffle(nn.relu(preact), 2), preact


class ShuffleNet(chain.Chain, kw_only=True):
    """The parts that both versions share.

    Attributes:
        widths: channels of the stages.
    """

    widths: tuple[int, ...]

    KERNEL_INIT: ClassVar[collections.abc.Callable] = layers.uniform_fan_in
    CLASSIFIER: ClassVar[str] = "linear"
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {
        **chain.Chain.TORCH_NAMES,
        ("head", "conv"): "conv2",
        ("head", "bn"): "bn2",
    }
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = ((r"^fc\.", "linear."),)

    @nn.nowrap
    def make_stem(self, name: str) -> layers.Stem:
        """See `chain.Chain`."""
        return layers.Stem(_STEM, 1, 1, self.style, name=name)

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (1, 0, "bn3") to "layer2.0.bn3"."""
        return f"layer{stage + 1}.{index}.{layer}"


class ShuffleNetV1(ShuffleNet, kw_only=True):
    """Version 1, with three groups per 1x1 convolution."""

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> GroupedBlock:
        """See `chain.Chain`."""
        stride = 1 if index else 2
        return GroupedBlock(self.widths[stage], stride, self.style, name=name)


class ShuffleNetV2(ShuffleNet, kw_only=True):
    """Version 2 of width factor 1, with a last convolution of 1024 channels."""

    HEAD: ClassVar[collections.abc.Mapping[str, Any]] = {"conv_features": 1024}

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> nn.Module:
        """See `chain.Chain`."""
        if index:
            return SplitBlock(self.style, name=name)
        return DownBlock(self.widths[stage], self.style, name=name)


NETWORKS = {
    "shuffle_v1": functools.partial(
        ShuffleNetV1, stage_sizes=(4, 8, 4), widths=(240, 480, 960)
    ),
    "shuffle_v2": functools.partial(
        ShuffleNetV2, stage_sizes=(4, 8, 4), widths=(116, 232, 464)
    ),
}
