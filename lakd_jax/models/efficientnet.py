"""EfficientNet B0 to B4 (Tan and Le 2019, arXiv 1905.11946), as torchvision has them.

MobileNetV2's inverted residuals with squeeze-and-excitation and SiLU, in seven stages.
The last convolution belongs to the head. All are described for images of 224x224;
B1 to B4 are published for 240, 288, 300 and 380.
"""

import collections.abc
import functools
import math
from typing import Any, ClassVar

from flax import linen as nn

from lakd_jax import fields
from lakd_jax.models import chain, layers, mobilenet, torch_names

Mapping = collections.abc.Mapping

# For each stage of B0: blocks, width, kernel and stride of the depthwise convolutions.
_STAGES = (
    (1, 16, 3, 1),
    (2, 24, 3, 2),
    (2, 40, 5, 2),
    (3, 80, 3, 2),
    (3, 112, 5, 1),
    (4, 192, 5, 2),
    (1, 320, 3, 1),
)
_EXPANSION = 6  # of all stages but the first, which has none
_STEM = 32


def scaled_width(width: int, percent: int) -> int:
    """Returns a multiple of 8 near `percent` of a width, and at least 90 % of that."""
    exact = width * percent / 100
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


class EfficientNet(chain.Chain, kw_only=True):
    """A stem and seven stages; features are the bottlenecks, without an activation.

    Attributes:
        percent: width in percent of B0's.
        dropout: share of the classifier's inputs that are dropped in training.
        drop_path: share of examples that skip a block in training; it grows evenly
            from 0 in the first block to this value after the last.
    """

    percent: int = 100
    dropout: float = 0.0
    drop_path: float = 0.0

    IMAGE_SIZE: ClassVar[int] = 224
    # Uniform on +-1/sqrt(classes), as torchvision does it.
    HEAD: ClassVar[Mapping[str, Any]] = {
        "kernel_init": nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform"),
        "zero_bias": True,
        "activation": nn.silu,
    }
    OPTIONS: ClassVar[Mapping[str, tuple[str, ...] | fields.Check]] = {
        "dropout": fields.below(1),
        "drop_path": fields.below(1),
    }
    NAMINGS: ClassVar[tuple[str, ...]] = ("torchvision", "timm")
    CLASSIFIER: ClassVar[str] = "classifier.1"
    OTHER_CLASSIFIERS: ClassVar[tuple[str, ...]] = (mobilenet.TIMM_CLASSIFIER,)
    TORCH_NAMES: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("stem", "conv"): "features.0.0",
        ("stem", "bn"): "features.0.1",
        ("head", "conv"): "features.8.0",
        ("head", "bn"): "features.8.1",
    }

    @nn.nowrap
    def make_stem(self, name: str) -> layers.Stem:
        """See `chain.Chain`."""
        width = scaled_width(_STEM, self.percent)
        return layers.Stem(width, 3, 2, self.style, nn.silu, name=name)

    @nn.nowrap
    def make_block(
        self, stage: int, index: int, name: str
    ) -> mobilenet.InvertedResidual:
        """See `chain.Chain`."""
        _, width, kernel, stride = _STAGES[stage]
        before = sum(self.stage_sizes[:stage]) + index
        return mobilenet.InvertedResidual(
            scaled_width(width, self.percent),
            1 if index else stride,
            _EXPANSION if stage else 0,
            nn.silu,
            self.style,
            kernel,
            True,
            layers.share_of_depth(self.drop_path, before, sum(self.stage_sizes)),
            name=name,
        )

    @nn.nowrap
    def make_head(self, name: str) -> layers.Head:
        """See `chain.Chain`."""
        width = 4 * scaled_width(_STAGES[-1][1], self.percent)
        own = {"conv_features": width, "dropout": self.dropout}
        options: dict[str, Any] = {**self.HEAD, **own}
        return layers.Head(self.num_classes, self.style, **options, name=name)

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Maps (1, 0, "bn2") to "features.2.0.block.1.1"."""
        place = f"features.{stage + 1}.{index}.block"
        first = 0 if stage else 1  # the first stage has no conv1
        if layer in ("squeeze", "excite"):
            return f"{place}.{2 - first}.{'fc1' if layer == 'squeeze' else 'fc2'}"
        # The third is after squeeze and excitation.
        position = {"1": 0, "2": 1, "3": 3}[layer[-1]] - first
        return f"{place}.{position}.{int(layer.startswith('bn'))}"

    @nn.nowrap
    def torch_key(self, path: tuple[str, ...], naming: str) -> str:
        """See `chain.Chain`."""
        if naming != "timm":
            return super().torch_key(path, naming)
        stage, index = 0, 0
        if path[0] not in ("stem", "head"):
            stage, index = torch_names.stage_and_index(".".join(path[:2]))
        return mobilenet.timm_key(path, stage, index, expanded=stage > 0)


# Width and depth in percent of B0's.
_SCALES = {0: (100, 100), 1: (100, 110), 2: (110, 120), 3: (120, 140), 4: (140, 180)}


def _network(width: int, depth: int) -> functools.partial:
    sizes = tuple(math.ceil(blocks * depth / 100) for blocks, *_ in _STAGES)
    return functools.partial(EfficientNet, stage_sizes=sizes, percent=width)


NETWORKS = {
    f"efficientnet_b{number}": _network(*scale) for number, scale in _SCALES.items()
}
