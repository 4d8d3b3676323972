"""DIST: correlations of the probabilities instead of their divergence.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (arXiv
2205.10536), the relations between and within classes, and the authors' public code of
the loss. The temperature and its square in front are those of others' code for CIFAR
(the repositories of TTM and KD++ agree); the authors' own CIFAR recipe is not known to
us.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill.base import method, numerics, term

_EPS = 1e-8  # of the public code, beside the product of two norms


def dist_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    beta: float,
    gamma: float,
    temperature: float,
) -> jax.Array:
    """T^2 (beta inter + gamma intra), each one minus a mean Pearson correlation.

    Inter correlates the two rows of probabilities of each example, intra the two
    columns of each class over the batch. The teacher gets no gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      beta: weight of inter.
      gamma: weight of intra.
      temperature: T > 0 of both softmaxes.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    ours = jax.nn.softmax(student / temperature)
    theirs = jax.nn.softmax(teacher / temperature)
    inter, intra = _distance(ours, theirs), _distance(ours.T, theirs.T)
    return temperature**2 * (beta * inter + gamma * intra)


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """One minus the mean Pearson correlation of the rows of two (N, M)."""
    a, b = (x - jnp.mean(x, -1, keepdims=True) for x in (a, b))
    products = jnp.sum(a * b, -1)
    return 1 - jnp.mean(products / (_norm(a) * _norm(b) + _EPS))


def _norm(x: jax.Array) -> jax.Array:
    """L2 norms of rows, whose gradient at a row of zeros is 0, not NaN."""
    squares = jnp.sum(x**2, -1)
    alive = squares > 0
    return jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1.0)), 0.0)


class DIST(term.LogitTerm):
    """ce_weight CE + weight * `dist_loss`."""

    weight: float = 1.0
    beta: float = fields.field(
        1.0, "of the correlation between classes, in each example", fields.at_least(0)
    )
    gamma: float = fields.field(
        1.0, "of the correlation within each class, over the batch", fields.at_least(0)
    )
    temperature: float = fields.field(4.0, check=fields.above(0))
    standardise: bool = fields.field(False)

    two_classes: ClassVar[str | None] = "gamma"  # two logits always correlate by 1
    least_batch: ClassVar[int] = 2  # one example has no correlation within a class

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `dist`."""
        options = (self.beta, self.gamma, self.temperature)
        return [{"dist": dist_loss(*self.logits(signals), *options)}]


METHODS = {"dist": DIST}
ORDER = 80  # in lists of methods
