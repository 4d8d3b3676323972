"""Attention transfer.

Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (arXiv
1612.03928), section 3.1; the public code's reduction.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill.base import adapter, method, numerics, term


def at_loss(
    student_features: Sequence[jax.Array],
    teacher_features: Sequence[jax.Array],
    p: float,
) -> jax.Array:
    """Sum over stages of the mean squared difference of attention maps.

    A map is the mean over channels of |f|^p, its positions divided by their L2 norm.
    Of two sizes the larger features are pooled to the smaller.

    Args:
      student_features: (B, H, W, C) each.
      teacher_features: as many, (B, H', W', C') each; they get no gradient.
      p: power; 2 in the public code.

    Returns:
      Scalar float32, never negative.
    """
    total = jnp.float32(0)
    for pair in zip(student_features, teacher_features, strict=True):
        student, teacher = adapter.match_size(*numerics.frozen(*pair))
        difference = _attention(student, p) - _attention(teacher, p)
        total += jnp.mean(difference**2)
    return total


def _attention(features: jax.Array, p: float) -> jax.Array:
    energy = jnp.mean(numerics.magnitude(features) ** p, axis=-1)
    return numerics.unit(energy.reshape(len(energy), -1))


class AT(term.Term):
    """ce_weight CE + weight * `at_loss`, in each module its own stage's part."""

    weight: float = 1000.0
    p: float = fields.field(2.0, "power of the activations", fields.above(0))

    staged: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `at`, one per module."""
        pairs = zip(signals.student_joints, signals.teacher_joints, strict=True)
        return [{"at": at_loss([ours], [theirs], self.p)} for ours, theirs in pairs]


METHODS = {"at": AT}
ORDER = 60  # in lists of methods
