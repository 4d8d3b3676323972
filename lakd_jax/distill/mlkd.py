"""Multi-level logit distillation: examples, the batch, and classes.

Source: Jin, Wang, Lin, "Multi-Level Logit Distillation" (CVPR 2023) and the authors'
public code, here on one view of each image, and so not the published recipe: that
trains 480 epochs at half the learning rate and shows each image twice, weakly and
strongly augmented. Published figures are not to be expected from this.

The public code multiplies each level of the weak view by a mask of the less confident
half, but after the reduction, which makes it a factor of about one half. Beside that it
has the level of examples in full, three temperatures on the strong view and two on the
weak one again. So the levels of the batch and of classes have a third of the weight of
that of examples, where the paper's sum has all three alike: here their weights are
options, and there are no masks.

By the same reductions the level of classes grows with B^2 / classes: with few classes
it outgrows all else unless `class_weight` is smaller.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill import kd
from lakd_jax.distill.base import method, numerics, term


def mlkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperatures: Sequence[float],
    batch_weight: float,
    class_weight: float,
    *,
    standardise: bool,
) -> jax.Array:
    """Sum over the temperatures of the losses on examples, the batch and classes.

    With probabilities P, (B, classes), at a temperature: `kd.kd_loss`; the squared
    difference of the two P P^T, (B, B), summed and divided by B, times `batch_weight`;
    that of the two P^T P, (classes, classes), by the classes, times `class_weight`. The
    teacher gets no gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      temperatures: each above 0.
      batch_weight, class_weight: of these two levels; 1 in the paper.
      standardise: `kd.standardised` logits for the examples; the other two levels see
        them as they are, as in the public code of logit standardisation.

    Returns:
      Scalar float32, never negative.
    """
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    first, second = student, teacher
    if standardise:
        first, second = kd.standardised(student), kd.standardised(teacher)
    total = jnp.float32(0)
    for temperature in temperatures:
        ours, theirs = (jax.nn.softmax(x / temperature) for x in (student, teacher))
        total += kd.kd_loss(first, second, temperature)
        total += batch_weight * _gram_distance(ours, theirs)
        total += class_weight * _gram_distance(ours.T, theirs.T)
    return total


def _gram_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """||A A^T - B B^T||^2 / N of two (N, M)."""
    return jnp.sum((a @ a.T - b @ b.T) ** 2) / len(a)


class MLKD(term.LogitTerm):
    """ce_weight CE + weight * `mlkd_loss`."""

    ce_weight: float = 0.1
    weight: float = 0.9
    temperatures: tuple[float, ...] = fields.field(
        (2.0, 3.0, 4.0, 5.0, 6.0), check=fields.some(fields.above(0))
    )
    batch_weight: float = fields.field(
        1 / 3, "of similarities of examples, as in the public code", fields.at_least(0)
    )
    class_weight: float = fields.field(
        1 / 3, "of those of classes; far less for few classes", fields.at_least(0)
    )
    standardise: bool = fields.field(
        False, "z-scores of the logits; then temperatures=(2, 2, 3, 5, 6), weight=9"
    )

    title: ClassVar[str] = "MLKD (one view)"

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `mlkd`."""
        loss = mlkd_loss(
            signals.student.logits,
            signals.teacher.logits,
            self.temperatures,
            self.batch_weight,
            self.class_weight,
            standardise=self.standardise,
        )
        return [{"mlkd": loss}]


METHODS = {"mlkd": MLKD}
ORDER = 120  # in lists of methods
