"""Correlation congruence, in the form of the public benchmark's code.

Source: Peng et al., "Correlation Congruence for Knowledge Distillation" (arXiv
1904.01802). The benchmark (RepDistiller) does not compute the paper's kernels: it
multiplies the differences of neighbours in the batch, and so do we.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import method, numerics, term


def cc_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over neighbours i, i + 1 of sum(|s_i - t_i| * |s_i+1 - t_i+1|).

    Args:
      student: (B, N) embeddings, B at least 2.
      teacher: (B, N); it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    return _congruence(*numerics.frozen(student, teacher))


def _congruence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    apart = numerics.magnitude(student - teacher)
    return jnp.mean(jnp.sum(apart[:-1] * apart[1:], -1))


class Embeddings(nn.Module):
    """A linear map of each network's features to a common width.

    Attributes:
      dim: that width.
    """

    dim: int

    @nn.compact
    def __call__(
        self, student: jax.Array, teacher: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(B, C) and (B, C'), the teacher's without gradient -> (B, dim) float32."""
        s, t = numerics.frozen(student, teacher)
        embed = nn.Dense(self.dim, name="student"), nn.Dense(self.dim, name="teacher")
        return embed[0](s), embed[1](t)


class CC(term.Term):
    """ce_weight CE + weight * the mean of `cc_loss`, of embedded features.

    The features are those that the classifiers read. Both embeddings are trained, the
    teacher's too, as in RepDistiller; so its loss can also fall by bringing both
    embeddings to one point.
    """

    weight: float = 0.02
    dim: int = fields.field(128, "of the embeddings", fields.at_least(1))

    least_batch: ClassVar[int] = 2
    teacher_reads: ClassVar[tuple[str, ...]] = ("pooled",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `cc`."""
        embed = Embeddings(self.dim, name="head")
        both = embed(signals.student.pooled, signals.teacher.pooled)
        return [{"cc": _congruence(*both)}]


METHODS = {"cc": CC}
ORDER = 170  # in lists of methods
