"""ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s", arXiv 2201.03545).

Depthwise 7x7 convolutions, one layer norm and one GELU per block, and no batch norm.
The smallest networks are timm's, which computes their 1x1 layers as convolutions and
therefore publishes their weights in another shape.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.models import chain, layers, torch_names

Mapping = collections.abc.Mapping


class Stem(nn.Module):
    """A convolution of squares that do not overlap, and a layer norm.

    Attributes:
        features: number of output channels.
        patch: kernel and stride of the convolution.
        style: settings shared by the network's layers.
    """

    features: int
    patch: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps images (B, H, W, 3) to two equal (B, H / patch, W / patch, features)."""
        x = layers.patches(self.features, self.patch, self.style, name="conv")(x)
        x = layers.layer_norm(self.style, name="norm")(x)
        return x, x


class Block(nn.Module):
    """Depthwise 7x7, layer norm, two 1x1 layers with a GELU between, and the input.

    Attributes:
        features: number of output channels.
        halve: whether a layer norm and a 2x2 convolution halve the input first.
        layer_scale: initial factor of the branch, per channel; 0 for no factor.
        drop_path: share of examples without the branch, in training.
        style: settings shared by the network's layers.
    """

    features: int
    halve: bool
    layer_scale: float
    drop_path: float
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to two equal arrays of `features` channels."""
        style, width = self.style, self.features
        if self.halve:
            x = layers.layer_norm(style, name="down_norm")(x)
            x = layers.patches(width, 2, style, name="down_conv")(x)
        conv = functools.partial(layers.conv, groups=width, bias=True, name="conv")
        h = conv(width, 7, 1, style)(x)
        h = layers.layer_norm(style, name="norm")(h)
        h = layers.gelu(self._dense(4 * width, "fc1")(h))
        h = self._dense(width, "fc2")(h)
        if self.layer_scale:
            constant = nn.initializers.constant(self.layer_scale)
            scale = self.param("layer_scale", constant, (width,), jnp.float32)
            h = h * scale.astype(h.dtype).reshape(1, 1, 1, -1)
        h = layers.drop_path(h, self.drop_path, train=train, name="drop_path")
        h = h + x.astype(h.dtype)
        return h, h

    def _dense(self, features: int, name: str) -> nn.Dense:
        dtype, init = self.style.dtype, self.style.kernel_init
        return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


# Layers by path, where {list} counts torchvision's stages and what lies between them.
_TORCHVISION = {
    "stem/conv": "features.0.0",
    "stem/norm": "features.0.1",
    "down_norm": "features.{between}.0",
    "down_conv": "features.{between}.1",
    "conv": "features.{list}.{index}.block.0",
    "norm": "features.{list}.{index}.block.2",
    "fc1": "features.{list}.{index}.block.3",
    "fc2": "features.{list}.{index}.block.5",
    "layer_scale": "features.{list}.{index}.layer_scale",
    "head/norm": "classifier.0",
    "head/dense": "classifier.2",
}
_TIMM = {
    "stem/conv": "stem.0",
    "stem/norm": "stem.1",
    "down_norm": "stages.{stage}.downsample.0",
    "down_conv": "stages.{stage}.downsample.1",
    "conv": "stages.{stage}.blocks.{index}.conv_dw",
    "norm": "stages.{stage}.blocks.{index}.norm",
    "fc1": "stages.{stage}.blocks.{index}.mlp.fc1",
    "fc2": "stages.{stage}.blocks.{index}.mlp.fc2",
    "layer_scale": "stages.{stage}.blocks.{index}.gamma",
    "head/norm": "head.norm",
    "head/dense": "head.fc",
}
_NAMES = {"torchvision": _TORCHVISION, "timm": _TIMM}


class ConvNeXt(chain.Chain, kw_only=True):
    """A stem and four stages; each after the first halves the resolution.

    With `patch` 2 this differs from timm's network of patch size 2, which halves the
    resolution before the first stage as well.

    Attributes:
        widths: channels of every stage; the stem has the first.
        patch: kernel and stride of the stem; 2 suits images of 32x32.
        dropout: share of the classifier's inputs that are dropped in training.
        drop_path: share of examples that skip the last block in training; it grows
            evenly from 0 in the first block.
        layer_scale: initial factor of the blocks' branches, per channel; 0 for none.
    """

    widths: tuple[int, ...]
    patch: int = 4
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 1e-6

    IMAGE_SIZE: ClassVar[int] = 224
    GATED: ClassVar[bool] = False
    KERNEL_INIT: ClassVar[collections.abc.Callable] = layers.token_normal
    HEAD: ClassVar[Mapping[str, Any]] = {
        "kernel_init": layers.token_normal,
        "zero_bias": True,
        "pooled_norm": True,
    }
    OPTIONS: ClassVar[Mapping[str, tuple[str, ...] | fields.Check]] = {
        "patch": fields.whole(1),
        "dropout": fields.below(1),
        "drop_path": fields.below(1),
        "layer_scale": fields.at_least(0),
    }
    NAMINGS: ClassVar[tuple[str, ...]] = ("torchvision", "timm")
    CLASSIFIER: ClassVar[str] = _TORCHVISION["head/dense"]
    OTHER_CLASSIFIERS: ClassVar[tuple[str, ...]] = (_TIMM["head/dense"],)

    @property
    def any_side(self) -> int:
        """See `chain.Chain`: the stages halve the stem's map three times."""
        return max(8 * self.patch, super().any_side)

    @nn.nowrap
    def make_stem(self, name: str) -> Stem:
        """See `chain.Chain`."""
        return Stem(self.widths[0], self.patch, self.style, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> Block:
        """See `chain.Chain`."""
        before = sum(self.stage_sizes[:stage]) + index
        steps = sum(self.stage_sizes) - 1
        return Block(
            self.widths[stage],
            stage > 0 and index == 0,
            self.layer_scale,
            layers.share_of_depth(self.drop_path, before, steps),
            self.style,
            name=name,
        )

    @nn.nowrap
    def make_head(self, name: str) -> layers.Head:
        """See `chain.Chain`."""
        options: dict[str, Any] = {**self.HEAD, "dropout": self.dropout}
        return layers.Head(self.num_classes, self.style, **options, name=name)

    @nn.nowrap
    def torch_key(self, path: tuple[str, ...], naming: str) -> str:
        """Maps ("stage2", "block1", "fc1", "bias") to "features.3.0.block.3.bias"."""
        names = _NAMES[naming]
        if path[0] in ("stem", "head"):
            return f"{names['/'.join(path[:-1])]}.{torch_names.LEAVES[path[-1]]}"
        stage, index = torch_names.stage_and_index(".".join(path[:2]))
        places = {"list": 2 * stage + 1, "between": 2 * stage}
        name = names[path[2]].format(stage=stage, index=index, **places)
        return ".".join([name, *(torch_names.LEAVES[leaf] for leaf in path[3:])])

    @nn.nowrap
    def torch_ones(self, key: str) -> int:
        """See `chain.Chain`; torchvision's layer scale is a vector per position."""
        return 2 if key.endswith(".layer_scale") else 0

    @classmethod
    def options_from_torch(
        cls, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """See `chain.Chain`; the layer scale is the usual one if there is any."""
        options = super().options_from_torch(shapes)
        stems = [f"{names['stem/conv']}.weight" for names in _NAMES.values()]
        found = [shapes[key] for key in stems if len(shapes.get(key, ())) == 4]
        scaled = any(key.endswith((".layer_scale", ".gamma")) for key in shapes)
        return options | {
            # Without a stem that will be reported as missing.
            "patch": max(found[0][-1], 1) if found else cls.patch,
            "layer_scale": cls.layer_scale if scaled else 0.0,
        }


class SmallConvNeXt(ConvNeXt, kw_only=True):
    """The networks that timm added, with its names as the reference."""

    NAMINGS: ClassVar[tuple[str, ...]] = ("timm", "torchvision")
    CLASSIFIER: ClassVar[str] = _TIMM["head/dense"]
    OTHER_CLASSIFIERS: ClassVar[tuple[str, ...]] = (_TORCHVISION["head/dense"],)

    @nn.nowrap
    def torch_ones(self, key: str) -> int:
        """See `chain.Chain`; timm computes the 1x1 layers as convolutions."""
        if ".mlp." in key and key.endswith(".weight"):
            return 2
        return super().torch_ones(key)


_SIZES = {
    "atto": (SmallConvNeXt, (2, 2, 6, 2), 40),
    "pico": (SmallConvNeXt, (2, 2, 6, 2), 64),
    "nano": (SmallConvNeXt, (2, 2, 8, 2), 80),
    "tiny": (ConvNeXt, (3, 3, 9, 3), 96),
    "small": (ConvNeXt, (3, 3, 27, 3), 96),
}

NETWORKS = {
    f"convnext_{size}": functools.partial(
        family, stage_sizes=sizes, widths=tuple(width * 2**i for i in range(4))
    )
    for size, (family, sizes, width) in _SIZES.items()
}
