"""MobileNets: version 1 (arXiv 1704.04861) and 2 (arXiv 1801.04381).

Version 2 in the half-wide form that distillation papers train on small images, where
each block expands and the activation is ReLU, and in the form for ImageNet, with ReLU6
and no expansion in the first block. Dropout before the classifier is left out.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import jax
from flax import linen as nn

from lakd_jax.models import chain, layers

Activation = collections.abc.Callable[[jax.Array], jax.Array]


class SeparableBlock(nn.Module):
    """Depthwise 3x3 and 1x1 convolution; returns (activation, pre-activation).

    Attributes:
        features: channels of the result.
        stride: of the depthwise convolution.
        style: of the network.
    """

    features: int
    stride: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map (B, H, W, C) to two arrays (B, H / stride, W / stride, features)."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        width = x.shape[-1]
        h = nn.relu(conv(x, width, 3, self.stride, groups=width, name="conv1"))
        preact = conv(h, self.features, 1, 1, name="conv2", gated=True)
        return nn.relu(preact), preact


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; the result is the bottleneck.

    Attributes:
        features: channels of the result.
        stride: of the depthwise convolution; the input is added where shapes agree.
        expansion: factor on the input's channels; 0 leaves the first convolution out.
        activation: after the first two convolutions.
        style: of the network.
    """

    features: int
    stride: int
    expansion: int
    activation: Activation
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map (B, H, W, C) to (B, H / stride, W / stride, features), twice the same."""
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
    """For images of 224x224; features begin with stage 1, at a quarter of the size."""

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
        """(0, 0, "bn2") -> "model.1.4": all units in one list."""
        places = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4}
        unit = 1 + sum(self.stage_sizes[:stage]) + index
        return f"model.{unit}.{places[layer]}"


# (group, place in it) of every block, by stage: version 2's paper has seven groups, of
# which the field's features take one, two, ... together.
_GROUPS = ((0, 1), (2,), (3, 4), (5, 6))
_REPEATS = (1, 2, 3, 4, 3, 3, 1)
_WIDTHS = (16, 24, 32, 64, 96, 160, 320)
_PLACES = tuple(
    tuple((group, i) for group in groups for i in range(_REPEATS[group]))
    for groups in _GROUPS
)


class MobileNetV2(chain.Chain, kw_only=True):
    """Inverted residuals; features are the bottlenecks, which have no ReLU.

    Attributes:
        strides: of the first block of each of the seven groups.
        percent: of the paper's widths, the last convolution's apart.
    """

    stage_sizes: tuple[int, ...] = tuple(map(len, _PLACES))
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
        group, place = _PLACES[stage][index]
        return InvertedResidual(
            _WIDTHS[group] * self.percent // 100,
            1 if place else self.strides[group],
            6 if group else self.FIRST_EXPANSION,
            type(self).ACTIVATION,
            self.style,
            name=name,
        )

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """(0, 0, "bn2") -> "blocks.0.0.conv.4"."""
        group, place = _PLACES[stage][index]
        # Convolution, norm, ReLU three times; the last without ReLU.
        step = 3 * (int(layer[-1]) - 1) + layer.startswith("bn")
        return f"blocks.{group}.{place}.conv.{step}"


def _timm_aliases() -> tuple[tuple[str, str], ...]:
    """Patterns that turn timm's names of the ImageNet network into torchvision's."""
    layers_of_first = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
    layers_of_others = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0"}
    layers_of_others |= {"bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
    whole = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    whole |= {"conv_head": "features.18.0", "bn2": "features.18.1"}
    aliases = [(rf"^{old}\.", f"{new}.") for old, new in whole.items()]
    aliases.append((r"^classifier\.(weight|bias)$", r"classifier.1.\1"))
    for group, table in (("0", layers_of_first), ("[1-6]", layers_of_others)):
        aliases += [
            (rf"^(blocks\.{group}\.\d)\.{old}\.", rf"\1.conv.{new}.")
            for old, new in table.items()
        ]
    places = [place for stage in _PLACES for place in stage]
    aliases += [
        (rf"^blocks\.{group}\.{index}\.", f"features.{number}.")
        for number, (group, index) in enumerate(places, 1)
    ]
    return tuple(aliases)


class ImageNetMobileNetV2(MobileNetV2, kw_only=True):
    """The full-width form for images of 224x224."""

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
        """(1, 0, "bn2") -> "features.4.conv.1.1": one list of blocks."""
        group, place = _PLACES[stage][index]
        step = int(layer[-1]) - (1 if group else 2)  # the first block has no conv1
        last, is_norm = layer[-1] == "3", int(layer.startswith("bn"))
        inner = f"{step + is_norm}" if last else f"{step}.{is_norm}"
        return f"features.{1 + sum(_REPEATS[:group]) + place}.conv.{inner}"


NETWORKS = {
    "mobilenet_v2": functools.partial(MobileNetV2),
    "mobilenet_v1": functools.partial(MobileNetV1, stage_sizes=(3, 2, 6, 2)),
    "mobilenet_v2_imagenet": functools.partial(ImageNetMobileNetV2),
}
