"""What all that are measured train: images, weights and recipe. Imports no JAX.

A process of a peer reads it from a file, so that its memory has no part of ours.
"""

import dataclasses
import itertools
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]  # in PyTorch's names and layouts

_PREPARED = 4  # batches that are made in advance
_EPS = 1e-5  # of batch norms


@dataclasses.dataclass(frozen=True)
class Work:
    """The same for all that are measured.

    Attributes:
      platform: of JAX's device: "cpu", "gpu" or "tpu".
      teacher: the network's name.
      student: the network's name.
      method: "none", "kd" or "lakd".
      dtype: "float32" or "bfloat16".
      methods: options of the methods, by method.
      images: (N, H, W, 3) uint8, of the training.
      labels: (N,) int32.
      classes: how many there are.
      order: (S, B) positions of the examples in each step, used again from the first.
      anew: whether batches are cropped and mirrored when they are used; otherwise a few
        are prepared in advance and used over and over, as if by other processes.
      mean: of the channels, for values in 0..1; of the teacher's images, too.
      std: of the channels.
      pad: pixels on each side, before a random crop.
      flip: whether half of the images are mirrored.
      lr: constant.
      momentum: of SGD.
      weight_decay: of SGD, added to the gradient.
      student_weights: before the first step.
      teacher_weights: batch norms not folded; None without a teacher.
      adapters: our parameters of LAKD's adapters, from the first module on.
      seed: of the crops of those that crop by other random numbers than ours.
      fields: of our config, those that differ from the defaults.
      test_images: (M, H, W, 3) uint8; None without a test.
      test_labels: (M,) int32; None without a test.
    """

    platform: str
    teacher: str
    student: str
    method: str
    dtype: str
    methods: Mapping[str, Mapping[str, Any]]
    images: np.ndarray
    labels: np.ndarray
    classes: int
    order: np.ndarray
    anew: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    lr: float
    momentum: float
    weight_decay: float
    student_weights: Weights
    teacher_weights: Weights | None
    adapters: tuple[Any, ...] = ()
    seed: int = 0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    test_images: np.ndarray | None = None
    test_labels: np.ndarray | None = None

    @property
    def batch_size(self) -> int:
        """Returns the number of examples in a step."""
        return self.order.shape[1]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields normalised images (B, H, W, 3), labels (B,) and positions (B,).

        Endless. For those that leave augmentation to the user's data loader.
        """
        rng, pad = np.random.default_rng(self.seed), self.pad
        padded = np.pad(self.images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        made = (
            (normalised(self, self._crops(padded, row, rng)), self.labels[row], row)
            for row in itertools.cycle(self.order)
        )
        if self.anew:
            return made
        return itertools.cycle(list(itertools.islice(made, _PREPARED)))

    def _crops(
        self, padded: np.ndarray, row: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns a random window of each image of `row`, mirrored or not, uint8."""
        count, side = len(row), self.images.shape[1]
        line = np.arange(side)
        top, left = rng.integers(0, 2 * self.pad + 1, (2, count, 1))
        mirrored = rng.random((count, 1)) < (0.5 if self.flip else 0.0)
        columns = np.where(mirrored, side - 1 - line, line) + left
        rows = line + top
        return padded[row[:, None, None], rows[:, :, None], columns[:, None, :]]

    def save(self, path: Path) -> None:
        """Writes everything to a file, for another process of this command."""
        with path.open("wb") as file:
            pickle.dump(self, file)


def load(path: Path) -> Work:
    """Reads what `Work.save` wrote."""
    with path.open("rb") as file:
        return pickle.load(file)


def normalised(work: Work, images: np.ndarray) -> np.ndarray:
    """Maps uint8 images (N, H, W, 3) to the networks' float32 input."""
    scale = 1 / (255 * np.array(work.std, np.float32))
    shift = -np.array(work.mean, np.float32) / np.array(work.std, np.float32)
    return images * scale + shift


def projected(weights: Weights, widths: tuple[int, ...]) -> Weights:
    """Returns weights with 1x1 convolutions that compute the shortcuts without any.

    For libraries whose networks have projections only: the kernel copies every channel
    to its place between the padded ones, and the batch norm changes nothing. Weights
    that have projections are returned as they are.

    Args:
      weights: of a three-stage residual network.
      widths: of the stem and the stages.
    """
    found = dict(weights)
    for stage in (2, 3):
        name, old, new = f"layer{stage}.0.downsample", widths[stage - 1], widths[stage]
        if f"{name}.0.weight" in weights:
            return weights
        kernel = np.zeros((new, old, 1, 1), np.float32)
        kernel[(new - old) // 2 + np.arange(old), np.arange(old)] = 1
        found[f"{name}.0.weight"] = kernel
        ones, zeros = np.ones(new, np.float32), np.zeros(new, np.float32)
        norm = {"weight": ones, "bias": zeros, "running_mean": zeros}
        norm["running_var"] = ones - np.float32(_EPS)
        found |= {f"{name}.1.{key}": value for key, value in norm.items()}
    return found
