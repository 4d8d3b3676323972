"""MobileNets: version 1 (arXiv 1704.04861) and 2 (arXiv 1801.04381).

Version 2 comes in two variants: the half-width one that distillation papers train on
small images, in which every block has its expansion convolution and the activation is
ReLU, and the one for ImageNet, with ReLU6 and no expansion in the first block. Dropout
before the classifier is omitted.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import jax
from flax import linen as nn

from lakd_jax.models import chain, layers

Activation = collections.abc.Callable[[jax.Array], jax.Array]


class SeparableBlock(nn.Module):
    """Depthwise 3x3 and 1x1 convolutions; returns (activation, pre-activation).

    Attributes:
        features: number of output channels.
        stride: of the depthwise convolution.
        style: settings shared by the network's layers.
    """

    features: int
    stride: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two arrays (B, H / stride, W / stride, features)."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        width = x.shape[-1]
        h = nn.relu(conv(x, width, 3, self.stride, groups=width, name="conv1"))
        preact = conv(h, self.features, 1, 1, name="conv2", gated=True)
        return nn.relu(preact), preact


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3 and linear 1x1; returns the bottleneck.

    Attributes:
        features: number of output channels.
        stride: of the depthwise convolution; the input is added if the shapes agree.
        expansion: factor on the input's channels; 0 omits the first convolution.
        activation: applied after the first two convolutions.
        style: settings shared by the network's layers.
    """

    features: int
    stride: int
    expansion: int
    activation: Activation
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two equal (B, H / stride, W / stride, features)."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        h, width = x, x.shape[-1] * max(self.expansion, 1)
        if self.expansion:
            h = self.activation(conv(h, width, 1, 1, name="conv1", gated=True))
        h = conv(h, width, 3, self.stride, groups=width, name="conv2")
        h = self.activation(h)
        h = conv(h, self.features, 1, 1, name="conv3", gated=True)
        if self.stride == 1 and x.shape[-1] == self.features:
            h = h + x.astype(h.dtype)
        return h, h


class MobileNetV1(chain.Chain, kw_only=True):
    """For images of 224x224; features start with stage 1, at a quarter of the size."""

    IMAGE_SIZE: ClassVar[int] = 224
    STEM_IN_FEATURES: ClassVar[bool] = False
    KERNEL_INIT: ClassVar[collections.abc.Callable] = layers.uniform_fan_in
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {
        ("stem", "conv"): "model.0.0",
        ("stem", "bn"): "model.0.1",
    }

    @nn.nowrap
    def make_stem(self, name: str) -> layers.Stem:
        """See `chain.Chain`."""
        return layers.Stem(32, 3, 2, self.style, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> SeparableBlock:
        """See `chain.Chain`; the first stage also has the only block of 64 channels."""
        widths = (64, 128, 128) if stage == 0 else (128 * 2**stage,) * 6
        halves = index == 1 if stage == 0 else index == 0
        stride = 2 if halves else 1
        return SeparableBlock(widths[index], stride, self.style, name=name)

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (0, 0, "bn2") to "model.1.4": all units are in one list."""
        positions = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4}
        unit = 1 + sum(self.stage_sizes[:stage]) + index
        return f"model.{unit}.{positions[layer]}"


# (group, index in it) of every block, by stage: version 2's paper has seven groups, and
# the literature takes features after groups 2, 3, 5 and 7.
_GROUPS = ((0, 1), (2,), (3, 4), (5, 6))
_REPEATS = (1, 2, 3, 4, 3, 3, 1)
_WIDTHS = (16, 24, 32, 64, 96, 160, 320)
_GROUP_AND_INDEX = tuple(
    tuple((group, i) for group in groups for i in range(_REPEATS[group]))
    for groups in _GROUPS
)


class MobileNetV2(chain.Chain, kw_only=True):
    """Inverted residuals; features are the bottlenecks, which have no ReLU.

    Attributes:
        strides: of the first block of each of the seven groups.
        percent: width in percent of the paper's, except for the last convolution.
    """

    stage_sizes: tuple[int, ...] = tuple(map(len, _GROUP_AND_INDEX))
    strides: tuple[int, ...] = (1, 1, 2, 2, 1, 2, 1)
    percent: int = 50

    ACTIVATION: ClassVar[Activation] = nn.relu
    FIRST_EXPANSION: ClassVar[int] = 1
    HEAD: ClassVar[collections.abc.Mapping[str, Any]] = {
        "kernel_init": layers.small_normal,
        "zero_bias": True,
        "conv_features": 1280,
        "activation": nn.relu,
    }
    CLASSIFIER: ClassVar[str] = "classifier.0"
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {
        ("stem", "conv"): "conv1.0",
        ("stem", "bn"): "conv1.1",
        ("head", "conv"): "conv2.0",
        ("head", "bn"): "conv2.1",
    }

    @nn.nowrap
    def make_stem(self, name: str) -> layers.Stem:
        """See `chain.Chain`."""
        width, activation = 32 * self.percent // 100, type(self).ACTIVATION
        return layers.Stem(width, 3, 2, self.style, activation, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> InvertedResidual:
        """See `chain.Chain`."""
        group, index = _GROUP_AND_INDEX[stage][index]
        return InvertedResidual(
            _WIDTHS[group] * self.percent // 100,
            1 if index else self.strides[group],
            6 if group else self.FIRST_EXPANSION,
            type(self).ACTIVATION,
            self.style,
            name=name,
        )

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (0, 0, "bn2") to "blocks.0.0.conv.4"."""
        group, index = _GROUP_AND_INDEX[stage][index]
        # Convolution, norm, ReLU three times; the last without ReLU.
        position = 3 * (int(layer[-1]) - 1) + layer.startswith("bn")
        return f"blocks.{group}.{index}.conv.{position}"


def _timm_aliases() -> tuple[tuple[str, str], ...]:
    """Returns patterns from timm's names of the ImageNet network to torchvision's."""
    layers_of_first = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
    layers_of_others = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0"}
    layers_of_others |= {"bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
    outside = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    outside |= {"conv_head": "features.18.0", "bn2": "features.18.1"}
    aliases = [(rf"^{old}\.", f"{new}.") for old, new in outside.items()]
    aliases.append((r"^classifier\.(weight|bias)$", r"classifier.1.\1"))
    for group, table in (("0", layers_of_first), ("[1-6]", layers_of_others)):
        aliases += [
            (rf"^(blocks\.{group}\.\d)\.{old}\.", rf"\1.conv.{new}.")
            for old, new in table.items()
        ]
    blocks = [block for stage in _GROUP_AND_INDEX for block in stage]
    aliases += [
        (rf"^blocks\.{group}\.{index}\.", f"features.{number}.")
        for number, (group, index) in enumerate(blocks, 1)
    ]
    return tuple(aliases)


class ImageNetMobileNetV2(MobileNetV2, kw_only=True):
    """The full-width variant for images of 224x224."""

    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    percent: int = 100

    IMAGE_SIZE: ClassVar[int] = 224
    ACTIVATION: ClassVar[Activation] = nn.relu6
    FIRST_EXPANSION: ClassVar[int] = 0
    HEAD: ClassVar[collections.abc.Mapping[str, Any]] = {
        **MobileNetV2.HEAD,
        "activation": nn.relu6,
    }
    CLASSIFIER: ClassVar[str] = "classifier.1"
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {
        ("stem", "conv"): "features.0.0",
        ("stem", "bn"): "features.0.1",
        ("head", "conv"): "features.18.0",
        ("head", "bn"): "features.18.1",
    }
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = _timm_aliases()

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (1, 0, "bn2") to "features.4.conv.1.1": all blocks are in one list."""
        group, index = _GROUP_AND_INDEX[stage][index]
        position = int(layer[-1]) - (1 if group else 2)  # the first block has no conv1
        last, is_norm = layer[-1] == "3", int(layer.startswith("bn"))
        inner = f"{position + is_norm}" if last else f"{position}.{is_norm}"
        return f"features.{1 + sum(_REPEATS[:group]) + index}.conv.{inner}"


NETWORKS = {
    "mobilenet_v2": functools.partial(MobileNetV2),
    "mobilenet_v1": functools.partial(MobileNetV1, stage_sizes=(3, 2, 6, 2)),
    "mobilenet_v2_imagenet": functools.partial(ImageNetMobileNetV2),
}
