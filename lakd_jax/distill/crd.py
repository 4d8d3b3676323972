"""Contrastive representation distillation, with memories of all training examples.

Source: Tian, Krishnan and Isola, "Contrastive Representation Distillation" (arXiv
1910.10699), equations 17 and 18; memories, constants and reduction of the public code.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import method, numerics, term
from lakd_jax.models import layers

_EPS = 1e-7
_UNSEEN = -1  # the label of an example that no batch has had


def nce_loss(scores: jax.Array, count: int) -> jax.Array:
    """The binary task "of this example or not", mean over the batch.

    h = p / (p + K / N) for each of 1 + K scores p; -log h of the first, which is the
    example's own, and the sum of -log(1 - h) over the others.

    Args:
      scores: (B, 1 + K) float32 of the normalised model p, all positive.
      count: N, examples of the training split.

    Returns:
      Scalar float32, never negative.
    """
    noise = (scores.shape[1] - 1) / count
    own, others = scores[:, 0], scores[:, 1:]
    # The public code has its epsilon in the denominators alone.
    positive = jnp.log(own / (own + noise + _EPS))
    negative = jnp.sum(jnp.log(noise / (others + noise + _EPS)), -1)
    return -jnp.mean(positive + negative)


def others(
    key: jax.Array, bank: jax.Array, labels: jax.Array, negatives: int
) -> jax.Array:
    """For each row of the batch examples of other classes, drawn with replacement.

    The public code draws without replacement where a split has enough of them.

    Args:
      key: of the draw.
      bank: (N,) int32, the class of each example of the split.
      labels: (B,) int32, of the batch; not all of the split may be of one class.
      negatives: how many.

    Returns:
      (B, negatives) int32, rows of the split.
    """
    by_class = jnp.argsort(bank)
    ordered = bank[by_class]
    first = jnp.searchsorted(ordered, labels, side="left")
    same = jnp.searchsorted(ordered, labels, side="right") - first
    # Places outside the class's own run of `same` places, each as likely.
    high = (len(bank) - same)[:, None]
    place = jax.random.randint(key, (len(labels), negatives), 0, high)
    return by_class[place + jnp.where(place >= first[:, None], same[:, None], 0)]


class Embedding(nn.Module):
    """Linear layer to the unit sphere; float32.

    The bias begins with 0, the public code's as PyTorch draws it.

    Attributes:
      dim: of the sphere's space.
    """

    dim: int

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """(B, C) -> (B, dim) float32 of length 1."""
        dense = nn.Dense(self.dim, kernel_init=layers.uniform_fan_in, name="dense")
        return numerics.unit(dense(pooled.astype(jnp.float32)))


class Contrast(nn.Module):
    """Embeddings and memories of student and teacher, and the loss between them.

    The memories are (N, dim) each, whole on every device. Scores are taken with all
    of a memory and then picked: that is less to hold than each row's negatives.

    Attributes:
      dim, negatives, temperature, momentum: see `CRD`.
    """

    dim: int
    negatives: int
    temperature: float
    momentum: float

    @nn.compact
    def __call__(self, signals: method.Signals, *, train: bool) -> jax.Array:
        """Student against the teacher's memory and the reverse, scalar float32."""
        rows: Any = signals.examples
        key: Any = signals.key
        moves = train and not self.is_initializing()
        classes = self.variable(
            "batch_stats", "classes", jnp.full, (signals.count,), _UNSEEN
        )
        bank = classes.value.at[rows].set(signals.labels)
        picked = others(key, bank, signals.labels, self.negatives)
        picked = jnp.concatenate([rows[:, None], picked], 1)
        frozen = jax.lax.stop_gradient(signals.teacher.pooled)
        student = Embedding(self.dim, name="student")(signals.student.pooled)
        teacher = Embedding(self.dim, name="teacher")(frozen)
        loss = jnp.float32(0)
        for name, own, anchor in (
            ("student", student, teacher),
            ("teacher", teacher, student),
        ):
            memory = self._memory(name, signals.count)
            scores = jnp.exp(anchor @ memory.value.T / self.temperature)
            scores = jnp.take_along_axis(scores, picked, 1)
            constant = self._constant(name, scores, signals.count, moves)
            loss += nce_loss(scores / constant, signals.count)
            if moves:
                memory.value = self._moved(memory.value, rows, own)
        if moves:
            classes.value = bank
        return loss

    def _memory(self, name: str, count: int) -> nn.Variable:
        """(count, dim), at first uniform with a mean squared length of 1."""

        def draw() -> jax.Array:
            bound = (3 / self.dim) ** 0.5
            key, shape = self.make_rng("params"), (count, self.dim)
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        return self.variable("batch_stats", f"{name}_memory", draw)

    def _constant(
        self, name: str, scores: jax.Array, count: int, moves: bool
    ) -> jax.Array:
        """N times the mean score of the first batch, which all later ones keep."""
        kept = self.variable("batch_stats", f"{name}_constant", jnp.zeros, ())
        first = jax.lax.stop_gradient(jnp.mean(scores)) * count
        constant = jnp.where(kept.value > 0, kept.value, first)
        if moves:
            kept.value = constant
        return constant

    def _moved(self, memory: jax.Array, rows: jax.Array, own: jax.Array) -> jax.Array:
        """The memory with its `rows` closer to the embeddings `own`, of length 1."""
        own = jax.lax.stop_gradient(own)
        mixed = self.momentum * memory[rows] + (1 - self.momentum) * own
        return memory.at[rows].set(numerics.unit(mixed))


class CRD(term.Term):
    """ce_weight CE + weight * the contrast of pooled features.

    Negatives are examples of other classes (the public code's "exact" mode). The
    classes are learnt as examples are seen: in the first epoch those that no batch has
    had count as of another class; their memories are random then.
    """

    weight: float = 0.8
    dim: int = fields.field(
        128,
        "of the embeddings; a memory of twice that many numbers an example",
        fields.at_least(1),
    )
    negatives: int = fields.field(
        16384, "for each example, with repetitions", fields.at_least(1)
    )
    temperature: float = fields.field(0.07, "of the scores", fields.above(0))
    momentum: float = fields.field(0.5, "of the memories", fields.between(0, 1))

    reads_labels: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("pooled",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `crd`."""
        options = (self.dim, self.negatives, self.temperature, self.momentum)
        return [{"crd": Contrast(*options, name="head")(signals, train=train)}]


METHODS = {"crd": CRD}
ORDER = 240  # in lists of methods
