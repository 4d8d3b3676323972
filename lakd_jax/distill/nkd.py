"""NKD: the label's probability and the normalised others, as cross-entropies.

Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation"
(arXiv 2303.13005), the normalised loss, and the authors' public code. It has no
temperature at the label and no warm-up.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill import dkd
from lakd_jax.distill.base import method, numerics, term


def nkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    gamma: float,
    temperature: float,
) -> jax.Array:
    """-q_t log p_t - gamma T^2 sum of q log p over the others, means over the batch.

    q is the teacher, p the student, t the label; the others' probabilities are
    softened by T and sum to one. As these are cross-entropies the least value is not 0,
    and a student that equals the teacher is the best only among the others. The teacher
    gets no gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      gamma: weight of the others.
      temperature: T > 0 of the others.

    Returns:
      Scalar float32, never negative.
    """
    target = jax.nn.one_hot(labels, student_logits.shape[-1], dtype=bool)
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    log_p, q = jax.nn.log_softmax(student), jax.nn.softmax(teacher)
    label = -jnp.sum(jnp.where(target, q * log_p, 0.0), -1)
    log_p = dkd.others(student / temperature, target)
    q = jnp.exp(dkd.others(teacher / temperature, target))
    # Both logarithms are 0 in the label's place, which adds nothing.
    others = -jnp.sum(q * log_p, -1)
    return jnp.mean(label + gamma * temperature**2 * others)


class NKD(term.LogitTerm):
    """ce_weight CE + weight * `nkd_loss`."""

    weight: float = 1.0
    gamma: float = fields.field(
        1.5, "of the classes other than the label", fields.at_least(0)
    )
    temperature: float = fields.field(1.0, "of the same", fields.above(0))
    standardise: bool = fields.field(False)

    two_classes: ClassVar[str | None] = ""
    reads_labels: ClassVar[bool] = True

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `nkd`."""
        options = (signals.labels, self.gamma, self.temperature)
        return [{"nkd": nkd_loss(*self.logits(signals), *options)}]


METHODS = {"nkd": NKD}
ORDER = 90  # in lists of methods
