"""Probabilistic knowledge transfer.

Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge
Transfer" (arXiv 1803.10837), equations 2 to 5 with the cosine kernel; the public code's
reduction.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax.distill.base import method, numerics, term

_EPS = 1e-7


def pkt_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Divergence of who is a neighbour of whom, mean over all pairs of examples.

    Similarities are (1 + cosine) / 2, each row divided by its sum.

    Args:
      student: (B, ...) features, pooled ones in the paper.
      teacher: (B, ...), of any width; it gets no gradient.

    Returns:
      Scalar float32, not negative but for rounding.
    """
    s, t = (_neighbours(numerics.flat(x)) for x in numerics.frozen(student, teacher))
    return jnp.mean(t * jnp.log((t + _EPS) / (s + _EPS)))


def _neighbours(x: jax.Array) -> jax.Array:
    unit = numerics.unit(x)
    similarities = (unit @ unit.T + 1) / 2
    return similarities / jnp.sum(similarities, -1, keepdims=True)


class PKT(term.Term):
    """ce_weight CE + weight * `pkt_loss` of the features that the classifiers read."""

    weight: float = 30000.0

    least_batch: ClassVar[int] = 2
    teacher_reads: ClassVar[tuple[str, ...]] = ("pooled",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `pkt`."""
        return [{"pkt": pkt_loss(signals.student.pooled, signals.teacher.pooled)}]


METHODS = {"pkt": PKT}
ORDER = 150  # in lists of methods
