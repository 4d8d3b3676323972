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
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.models import chain, layers, torch_names

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
    """1x1 expansion, depthwise and linear 1x1 convolution; returns the bottleneck.

    Attributes:
        features: number of output channels.
        stride: of the depthwise convolution; the input is added if the shapes agree.
        expansion: factor on the input's channels; 0 omits the first convolution.
        activation: applied after the first two convolutions.
        style: settings shared by the network's layers.
        kernel: size of the depthwise convolution.
        squeeze: whether channels are weighted before the last convolution.
        drop_path: share of examples without the branch in training, if the input is
            added.
    """

    features: int
    stride: int
    expansion: int
    activation: Activation
    style: layers.Style
    kernel: int = 3
    squeeze: bool = False
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two equal (B, H / stride, W / stride, features)."""
        conv = functools.partial(layers.conv_norm, style=self.style, train=train)
        h, width = x, x.shape[-1] * max(self.expansion, 1)
        if self.expansion:
            h = self.activation(conv(h, width, 1, 1, name="conv1", gated=True))
        h = conv(h, width, self.kernel, self.stride, groups=width, name="conv2")
        h = self.activation(h)
        if self.squeeze:
            h = h * self._weights(h, x.shape[-1] // 4)
        h = conv(h, self.features, 1, 1, name="conv3", gated=True)
        if self.stride == 1 and x.shape[-1] == self.features:
            h = layers.drop_path(h, self.drop_path, train=train, name="drop_path")
            h = h + x.astype(h.dtype)
        return h, h

    def _weights(self, h: jax.Array, width: int) -> jax.Array:
        """Computes a weight per image and channel (Hu et al., arXiv 1709.01507)."""
        layer = functools.partial(layers.conv, style=self.style, bias=True)
        dtype = jnp.promote_types(h.dtype, jnp.float32)
        pooled = jnp.mean(h, (1, 2), keepdims=True, dtype=dtype)
        hidden = self.activation(layer(width, 1, 1, name="squeeze")(pooled))
        return nn.sigmoid(layer(h.shape[-1], 1, 1, name="excite")(hidden))


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


TIMM_CLASSIFIER = "classifier"

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


# timm's names, which number the norms of a block by their order.
_TIMM: dict[tuple[str, ...], str] = {
    ("stem", "conv"): "conv_stem",
    ("stem", "bn"): "bn1",
    ("head", "conv"): "conv_head",
    ("head", "bn"): "bn2",
    ("head", "dense"): TIMM_CLASSIFIER,
}
_TIMM_SQUEEZE = {"squeeze": "se.conv_reduce", "excite": "se.conv_expand"}
_TIMM_EXPANDED = {
    **{"conv1": "conv_pw", "conv2": "conv_dw", "conv3": "conv_pwl"},
    **{"bn1": "bn1", "bn2": "bn2", "bn3": "bn3"},
    **_TIMM_SQUEEZE,
}
_TIMM_PLAIN = {
    **{"conv2": "conv_dw", "conv3": "conv_pw", "bn2": "bn1", "bn3": "bn2"},
    **_TIMM_SQUEEZE,
}


def timm_key(path: tuple[str, ...], group: int, index: int, expanded: bool) -> str:
    """Returns timm's key of an array of a network of inverted residuals.

    Args:
        path: of the array in our tree.
        group, index: number of the block's group and of the block in it, from 0.
        expanded: whether the block has its first convolution.
    """
    leaf = torch_names.LEAVES[path[-1]]
    if path[0] in ("stem", "head"):
        return f"{_TIMM[path[:-1]]}.{leaf}"
    names = _TIMM_EXPANDED if expanded else _TIMM_PLAIN
    return f"blocks.{group}.{index}.{names[path[2]]}.{leaf}"


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
    NAMINGS: ClassVar[tuple[str, ...]] = ("torchvision", "timm")
    OTHER_CLASSIFIERS: ClassVar[tuple[str, ...]] = (TIMM_CLASSIFIER,)

    @nn.nowrap
    def torch_key(self, path: tuple[str, ...], naming: str) -> str:
        """See `chain.Chain`."""
        if naming != "timm":
            return super().torch_key(path, naming)
        group, index = 0, 0
        if path[0] not in ("stem", "head"):
            stage, index = torch_names.stage_and_index(".".join(path[:2]))
            group, index = _GROUP_AND_INDEX[stage][index]
        return timm_key(path, group, index, expanded=group > 0)

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
