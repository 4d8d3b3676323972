"""Refined logit distillation: the teacher's mistakes are not passed on.

Source: Sun et al., "Knowledge Distillation with Refined Logits" (arXiv 2408.07703)
and the authors' public code. Sample confidence distillation (SCD) teaches how sure to
be of the label, masked correlation distillation (MCD) how the classes relate that the
teacher ranks below the label.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill import dkd
from lakd_jax.distill.base import method, numerics, term

_MASKED = -1e9  # a logit of no weight; -inf would give NaN where no class is left


def scd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: float,
) -> jax.Array:
    """T^2 * mean KL of "the class of choice or not" with "the label or not".

    The confidence that the teacher has in its own choice, whichever class that is, is
    the target for the student's probability of the label. The teacher gets no
    gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      temperature: T > 0.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    both = numerics.frozen(student_logits, teacher_logits)
    student, teacher = (logits / temperature for logits in both)
    label, choice = (
        jax.nn.one_hot(index, student.shape[-1], dtype=bool)
        for index in (labels, jnp.argmax(teacher, -1))
    )
    divergence = numerics.divergence(
        dkd.target_or_not(teacher, choice), dkd.target_or_not(student, label)
    )
    return temperature**2 * jnp.mean(divergence)


def mcd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: float,
) -> jax.Array:
    """T^2 * mean KL(p_T || p_S) of the classes that the teacher ranks below the label.

    The label, and classes whose logit equals or exceeds the teacher's logit of the
    label, take no part. An example without any class left, or with one, counts as 0
    and gets no gradient; nor does the teacher.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      temperature: T > 0.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    kept = teacher < jnp.take_along_axis(teacher, labels[:, None], -1)
    log_s, log_t = (
        jax.nn.log_softmax(jnp.where(kept, logits / temperature, _MASKED))
        for logits in (student, teacher)
    )
    return temperature**2 * jnp.mean(numerics.divergence(log_t, log_s))


class RLD(term.LogitTerm):
    """ce_weight CE + weight * (alpha `scd_loss` + beta `mcd_loss`).

    The public code has a temperature of 1 in SCD unless it is given `--same-t`, as it
    is in the command of its README; the default here is that command's.
    """

    weight: float = 1.0
    warmup_epochs: float = 20.0
    alpha: float = fields.field(
        1.0, "of the confidence in the label", fields.at_least(0)
    )
    beta: float = fields.field(
        8.0,
        "of the classes that the teacher ranks below the label; 0.5 or 2 on ImageNet",
        fields.at_least(0),
    )
    temperature: float = fields.field(4.0, "of what beta weighs", fields.above(0))
    alpha_temperature: float = fields.field(
        4.0,
        "of what alpha weighs; 1 in the public code without --same-t",
        fields.above(0),
    )
    standardise: bool = fields.field(
        False, "z-scores of the logits; then both temperatures 2 and weight=9"
    )

    two_classes: ClassVar[str | None] = "alpha"
    reads_labels: ClassVar[bool] = True

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `rld`."""
        given = (*self.logits(signals), signals.labels)
        confidence = scd_loss(*given, self.alpha_temperature)
        correlation = mcd_loss(*given, self.temperature)
        return [{"rld": self.alpha * confidence + self.beta * correlation}]


METHODS = {"rld": RLD}
ORDER = 310  # in lists of methods
