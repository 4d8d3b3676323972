"""Evaluates a network on all examples of a split."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lakd_jax.data import device
from lakd_jax.models import chain
from lakd_jax.runtime import backend, interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import feeds
from lakd_jax.training import spec as spec_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Score:
    """The number of correct predictions, and the mean cross-entropy."""

    right: int
    examples: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Returns the share of correct predictions, in 0..1."""
        return self.right / self.examples


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A network's answers on a split, in its order: logits (N, K), labels (N,)."""

    score: Score
    logits: np.ndarray
    labels: np.ndarray


class Evaluator:
    """Scores a network on a split, each example exactly once.

    The last batch is padded and masked, so that all batches run the same compiled
    program. A signal to `guard` stops the evaluation between batches.
    """

    def __init__(
        self,
        model: chain.Chain,
        pixels: spec_lib.Pixels,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        guard: interrupt.Guard,
        model_at: Callable[[Any], chain.Chain] | None = None,
    ):
        """Creates the evaluator.

        `model_at` returns the network in effect in a step, for networks that change
        during training.
        """
        self._model, self._pixels, self._mesh = model, pixels, mesh
        self._batch_size, self._guard, self._model_at = batch_size, guard, model_at
        self._programs: dict[tuple[int, ...], Any] = {}

    def __call__(
        self,
        variables: PyTree,
        data: feeds.Data,
        step: int = 0,
    ) -> Score:
        """Returns the score of `variables` on all of `data`, as of step `step`."""
        totals = [batch[:2] for batch, _ in self._batches(variables, data, step)]
        return _score(totals, feeds.count(data))

    def predict(
        self, variables: PyTree, data: feeds.Data, step: int = 0
    ) -> Predictions:
        """Returns the answers of `variables` on all of `data`, and their score."""
        found = []
        for batch, mask in self._batches(variables, data, step):
            right, loss, logits, labels = jax.device_get(batch)
            found.append(((right, loss), logits[mask], labels[mask]))
        totals, logits, labels = zip(*found, strict=True)
        score = _score(totals, feeds.count(data))
        return Predictions(score, np.concatenate(logits), np.concatenate(labels))

    def _batches(
        self, variables: PyTree, data: feeds.Data, step: int
    ) -> Iterator[tuple[tuple[jax.Array, ...], np.ndarray]]:
        """Yields the outputs of `_batch` and the mask of each batch."""
        step_number = jnp.int32(step) if self._model_at else None
        for batch, rows, mask in feeds.testing(data, self._batch_size):
            arguments = (variables, batch, rows, mask, step_number)
            yield self._program(arguments)(*arguments), mask
            self._guard.check()

    def _program(self, arguments: tuple) -> Any:
        shape = arguments[1].images.shape
        if shape not in self._programs:
            lowered = self.lowered(*arguments)
            self._programs[shape] = backend.compiled(lowered, self._guard)
        return self._programs[shape]

    def lowered(self, *arguments: Any) -> Any:
        """Returns the program of a batch before it is compiled; see `_batch`."""
        return jax.jit(self._batch).lower(*arguments)

    def _batch(
        self,
        variables: PyTree,
        data: device.DeviceData,
        rows: jax.Array,
        mask: jax.Array,
        step: jax.Array | None,
    ) -> tuple[jax.Array, ...]:
        """Returns the number right, the summed loss, logits (B, K) and labels (B,)."""
        sharding = mesh_lib.over_batch(self._mesh)
        images, labels, _ = data.at(rows)
        images = jax.lax.with_sharding_constraint(images, sharding)
        model = self._model_at(step) if self._model_at else self._model
        outputs: Any = model.apply(variables, self._pixels(images), train=False)
        logits = outputs.logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = (jnp.argmax(logits, -1) == labels) & mask
        # On every device, so that every process can read all of them.
        answers = jax.lax.with_sharding_constraint(
            (logits.astype(jnp.float32), labels), mesh_lib.replicated(self._mesh)
        )
        return jnp.sum(right), jnp.sum(jnp.where(mask, losses, 0.0)), *answers


def _score(totals: Sequence[tuple[Any, ...]], examples: int) -> Score:
    right, loss = np.sum(jax.device_get(totals), axis=0)
    return Score(int(right), examples, float(loss) / examples)
