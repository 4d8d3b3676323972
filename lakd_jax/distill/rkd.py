"""Relational knowledge distillation: distances and angles between examples.

Source: Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068), equations
4 to 9; the public code's reduction.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from lakd_jax import fields
from lakd_jax.distill.base import method, numerics, term

_LEAST = 1e-12  # of a squared distance


def rkd_loss(
    student: jax.Array,
    teacher: jax.Array,
    distance_weight: float,
    angle_weight: float,
) -> jax.Array:
    """Huber losses of all distances between two examples, and angles among three.

    Distances are divided by their mean over pairs of different examples.

    Args:
      student: (B, ...) features, pooled ones in the paper.
      teacher: (B, ...), of any width; it gets no gradient.
      distance_weight: 25 in the public recipe.
      angle_weight: 50 in the public recipe.

    Returns:
      Scalar float32, never negative.
    """
    s, t = (numerics.flat(x) for x in numerics.frozen(student, teacher))
    huber = optax.losses.huber_loss
    distance = jnp.mean(huber(_distances(s), _distances(t)))
    angle = jnp.mean(huber(_angles(s), _angles(t)))
    return distance_weight * distance + angle_weight * angle


def _distances(x: jax.Array) -> jax.Array:
    """(B, B), 0 on the diagonal, relative to the mean of the positive ones."""
    squares = jnp.sum(x * x, -1)
    squared = squares[:, None] + squares[None] - 2 * x @ x.T
    # Below the least the gradient is 0, as of a clamp; so it is on the diagonal.
    apart = (squared > _LEAST) & ~jnp.eye(len(x), dtype=bool)
    distances = jnp.sqrt(jnp.where(apart, squared, _LEAST))
    distances = jnp.where(jnp.eye(len(x), dtype=bool), 0.0, distances)
    count = jnp.maximum(jnp.sum(distances > 0), 1)
    return distances / (jnp.sum(distances) / count)


def _angles(x: jax.Array) -> jax.Array:
    """(B, B, B) cosines at example i between the directions to j and k."""
    directions = numerics.unit(x[None] - x[:, None])
    return jnp.einsum("ijc,ikc->ijk", directions, directions)


class RKD(term.Term):
    """ce_weight CE + weight * `rkd_loss` of the features that the classifiers read."""

    weight: float = 1.0
    distance_weight: float = fields.field(
        25.0, "of the distances between two examples", fields.at_least(0)
    )
    angle_weight: float = fields.field(
        50.0, "of the angles among three", fields.at_least(0)
    )

    least_batch: ClassVar[int] = 2
    teacher_reads: ClassVar[tuple[str, ...]] = ("pooled",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `rkd`."""
        features = (signals.student.pooled, signals.teacher.pooled)
        return [{"rkd": rkd_loss(*features, self.distance_weight, self.angle_weight)}]


METHODS = {"rkd": RKD}
ORDER = 140  # in lists of methods
