"""Similarity-preserving distillation.

Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (arXiv
1907.09682), equations 1 to 4.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax.distill.base import method, numerics, term


def sp_loss(student_feature: jax.Array, teacher_feature: jax.Array) -> jax.Array:
    """Mean squared difference of the two matrices of similarities between examples.

    A matrix is F F^T, (B, B), of flattened features, each row divided by its L2 norm.
    Sizes and widths of the two features may differ.

    Args:
      student_feature: (B, ...), the last one in the paper.
      teacher_feature: (B, ...); it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    student, teacher = numerics.frozen(student_feature, teacher_feature)
    return jnp.mean((_similarities(student) - _similarities(teacher)) ** 2)


def _similarities(feature: jax.Array) -> jax.Array:
    rows = numerics.flat(feature)
    return numerics.unit(rows @ rows.T)


class SP(term.Term):
    """ce_weight CE + weight * `sp_loss` of the last stage's features."""

    weight: float = 3000.0

    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `sp`."""
        return [{"sp": sp_loss(signals.student_joints[-1], signals.teacher_joints[-1])}]


METHODS = {"sp": SP}
ORDER = 70  # in lists of methods
