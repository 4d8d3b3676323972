"""Answers for images of any size, by a trained network and its run's preparation."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from lakd_jax.data import preparation as preparation_lib
from lakd_jax.models import chain
from lakd_jax.training import spec as spec_lib

BATCH = 256  # images per call, so that memory does not grow with their number


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A network with everything between an image file and its logits.

    Attributes:
      variables: of `model`.
      pixels: from prepared uint8 images to the network's input.
      preparation: from images of any size to those that `pixels` takes.
    """

    model: chain.Chain
    variables: Any
    pixels: spec_lib.Pixels
    preparation: preparation_lib.Preparation

    def __call__(
        self, pictures: np.ndarray | Iterable[preparation_lib.Picture]
    ) -> np.ndarray:
        """Computes float32 logits (N, classes).

        Args:
          pictures: RGB arrays (N, H, W, 3) uint8 of any size, or paths, PIL images and
            arrays (H, W, 3), which may differ in size.

        Raises:
          DataError: a file cannot be decoded.
          TypeError, ValueError: one of them is no picture.
        """
        if isinstance(pictures, str | os.PathLike):
            raise TypeError(f"expected a list of pictures; write [{pictures!r}]")
        if not isinstance(pictures, np.ndarray):
            pictures = list(pictures)
        starts = range(0, max(len(pictures), 1), BATCH)
        parts = (self.preparation.all(pictures[s : s + BATCH]) for s in starts)
        return np.concatenate(
            [np.asarray(self._logits(self.variables, part)) for part in parts]
        )

    @functools.cached_property
    def _logits(self) -> Any:
        def logits(variables: Any, images: jax.Array) -> jax.Array:
            outputs: Any = self.model.apply(variables, self.pixels(images), train=False)
            return outputs.logits

        return jax.jit(logits)
