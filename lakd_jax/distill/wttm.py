"""Transformed teacher matching, plain and weighted: a temperature for the teacher only.

Source: Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching"
(arXiv 2402.11148), TTM and its weighted form WTTM, and the authors' public code. The
exponent is 1 / T of the paper. Here in logarithms, where the public code raises
probabilities to a power: the same where those do not underflow.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill.base import method, numerics, term


def ttm_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, exponent: float
) -> jax.Array:
    """Mean over the batch of KL(q^e / sum q^e || p), with q the teacher.

    There is no square of a temperature in front. The teacher gets no gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      exponent: e, above 0 and below 1 for targets softer than the teacher.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    divergence, _ = _match(student_logits, teacher_logits, exponent)
    return jnp.mean(divergence)


def wttm_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, exponent: float
) -> jax.Array:
    """`ttm_loss` with each example weighed by sum q^e, more for smoother teachers.

    Args:
      student_logits: (B, classes), any floating type.
      teacher_logits: (B, classes), any floating type; no gradient.
      exponent: see `ttm_loss`.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    divergence, power_sum = _match(student_logits, teacher_logits, exponent)
    return jnp.mean(power_sum * divergence)


def _match(
    student_logits: jax.Array, teacher_logits: jax.Array, exponent: float
) -> tuple[jax.Array, jax.Array]:
    """Of each example the divergence and sum q^e, (B,) each."""
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    log_p = jax.nn.log_softmax(student)
    powers = exponent * jax.nn.log_softmax(teacher)
    log_sum = jax.nn.logsumexp(powers, -1, keepdims=True)
    log_q = powers - log_sum
    return numerics.divergence(log_q, log_p), jnp.exp(log_sum[:, 0])


_ABOUT = (
    "Of the examples that the public code shows: TTM alone for VGG13 to VGG8, and WTTM "
    "beside CRD. The paper has other values for each pair."
)


class TTM(term.LogitTerm):
    """ce_weight CE + weight * `ttm_loss`."""

    weight: float = 45.0
    exponent: float = fields.field(
        0.1, "of the teacher's probabilities; 1 / its temperature", fields.above(0)
    )
    standardise: bool = fields.field(False)

    about: ClassVar[str] = _ABOUT

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `ttm`."""
        return [{"ttm": ttm_loss(*self.logits(signals), self.exponent)}]


class WTTM(term.LogitTerm):
    """ce_weight CE + weight * `wttm_loss`."""

    weight: float = 4.0
    exponent: float = fields.field(
        0.2, "of the teacher's probabilities; 1 / its temperature", fields.above(0)
    )
    standardise: bool = fields.field(False)

    about: ClassVar[str] = _ABOUT

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `wttm`."""
        return [{"wttm": wttm_loss(*self.logits(signals), self.exponent)}]


METHODS = {"ttm": TTM, "wttm": WTTM}
ORDER = 100  # in lists of methods
