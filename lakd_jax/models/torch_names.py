"""The names of a network's arrays in PyTorch, declared by its family."""

import collections.abc
import itertools
from typing import Any, ClassVar

from lakd_jax import fields
from lakd_jax.models import projector

Mapping = collections.abc.Mapping

# Our names of the arrays of a layer -> PyTorch's.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "logits": "logits",  # of HME's gates
    "mean": "running_mean",
    "var": "running_var",
}


class TorchNames:
    """What a family (see `chain.Chain`) declares about its PyTorch counterpart."""

    # Options that `create` accepts besides num_classes and dtype, with their values or
    # a check of them.
    OPTIONS: ClassVar[Mapping[str, tuple[str, ...] | fields.Check]] = {}
    # The names under which its weights are published; the first is the reference.
    NAMINGS: ClassVar[tuple[str, ...]] = ("",)
    # PyTorch's names of the classifier (by the reference, and by the other `NAMINGS`)
    # and, by path, of the stem's and head's layers.
    CLASSIFIER: ClassVar[str] = "fc"
    OTHER_CLASSIFIERS: ClassVar[tuple[str, ...]] = ()
    TORCH_NAMES: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("stem", "conv"): "conv1",
        ("stem", "bn"): "bn1",
    }
    # (pattern, replacement) pairs from other PyTorch names to the reference's.
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = ()

    def key(self, path: tuple[str, ...], naming: str) -> str:
        """Returns the PyTorch key of the array at `path`, also in a borrowed head.

        A borrowed classifier has the name of the family's, a projector its own.
        """
        if projector.in_head(path):
            return ".".join((*path[1:-1], LEAVES[path[-1]]))
        if path[0] == "head" and projector.is_borrowed(path):
            path = ("head", "dense", path[-1])
        return self.torch_key(path, naming)

    def torch_key(self, path: tuple[str, ...], naming: str) -> str:
        """Returns the published PyTorch key of the array at `path` in our tree.

        `naming` is one of `NAMINGS`.
        """
        del naming
        return f"{self.torch_name(path[:-1])}.{LEAVES[path[-1]]}"

    def torch_ones(self, key: str) -> int:
        """Returns how many axes of length 1 the array `key` has at the end there."""
        del key
        return 0

    def torch_name(self, path: tuple[str, ...]) -> str:
        """Returns the published PyTorch name of the layer at `path` in our tree."""
        if path == ("head", "dense"):
            return self.CLASSIFIER
        if path in self.TORCH_NAMES:
            return self.TORCH_NAMES[path]
        if path[0] in ("stem", "head"):
            return ".".join(path)  # of a family that is not published
        stage, index = stage_and_index(".".join(path[:2]))
        return self.torch_block_name(stage, index, ".".join(path[2:]))

    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """Returns the PyTorch name of a layer of a block; both numbers count from 0.

        Defaults to our own name, for families not published under others.
        """
        return f"stage{stage + 1}.block{index + 1}.{layer}"

    @classmethod
    def tree_options(cls) -> list[dict[str, Any]]:
        """Returns options (see `OPTIONS`) that together cover every possible array."""
        listed = {k: v for k, v in cls.OPTIONS.items() if isinstance(v, tuple)}
        values = itertools.product(*listed.values())
        return [dict(zip(listed, chosen, strict=True)) for chosen in values]

    @classmethod
    def options_from_torch(
        cls, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """Infers `num_classes` and the family's options from PyTorch keys and shapes.

        The keys may have the names of any of the `NAMINGS`. Raises KeyError naming the
        required key that is missing or has the wrong shape.
        """
        classifiers = (cls.CLASSIFIER, *cls.OTHER_CLASSIFIERS)
        names = [f"{name}.weight" for name in classifiers]
        key = next((name for name in names if name in shapes), names[0])
        shape = shapes.get(key, ())
        if len(shape) != 2 or shape[0] < 1:
            raise KeyError(key)
        return {"num_classes": shape[0]}


def stage_and_index(unit: str) -> tuple[int, int]:
    """Returns a block's stage and index in it, from 0: "stage2.block1" -> (1, 0)."""
    stage, block = unit.split(".")
    return int(stage.removeprefix("stage")) - 1, int(block.removeprefix("block")) - 1
