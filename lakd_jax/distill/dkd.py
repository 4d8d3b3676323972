"""Decoupled knowledge distillation: target and other classes weighed apart.

Source: Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679), equations
5 to 7; the public code's reduction.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill.base import method, numerics, term


def dkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: float,
    beta: float,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """T^2 (alpha TCKD + beta NCKD), means over the batch.

    TCKD is the divergence of "the label or not", NCKD that of the classes other than
    the label among themselves. The teacher gets no gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      alpha: weight of TCKD; 1 in the paper.
      beta: weight of NCKD; 8 in most of the paper's CIFAR pairs.
      temperature: T > 0; 4 on CIFAR.
      where: (B,) bool, the examples that count; None for all.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    target = jax.nn.one_hot(labels, student_logits.shape[-1], dtype=bool)
    both = numerics.frozen(student_logits, teacher_logits)
    student, teacher = (logits / temperature for logits in both)
    each = alpha * tckd(student, teacher, target) + beta * nckd(
        student, teacher, target
    )
    return temperature**2 * jnp.mean(each, where=where)


def tckd(student: jax.Array, teacher: jax.Array, target: jax.Array) -> jax.Array:
    """Returns KL (B,) of "the label or not".

    Args:
      student, teacher: logits (B, classes) over the temperature, float32.
      target: (B, classes) bool, the label's place.
    """
    return numerics.divergence(
        target_or_not(teacher, target), target_or_not(student, target)
    )


def nckd(student: jax.Array, teacher: jax.Array, left_out: jax.Array) -> jax.Array:
    """Returns KL (B,) of some classes among themselves.

    Args:
      student, teacher: logits (B, classes) over the temperature, float32.
      left_out: (B, classes) bool, the label's place, and what else takes no part.
    """
    return numerics.divergence(others(teacher, left_out), others(student, left_out))


def target_or_not(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Log-probabilities of one class, and of all others together.

    Args:
      logits: (B, classes) float32.
      target: (B, classes) bool, the place of the one class.

    Returns:
      (B, 2).
    """
    label = jnp.sum(jnp.where(target, logits, 0.0), -1)
    others = jax.nn.logsumexp(jnp.where(target, -jnp.inf, logits), -1)
    return jax.nn.log_softmax(jnp.stack([label, others], -1))


def others(logits: jax.Array, left_out: jax.Array) -> jax.Array:
    """Log-probabilities of the classes that are not left out among themselves.

    Args:
      logits: (B, classes) float32.
      left_out: (B, classes) bool.

    Returns:
      (B, classes); 0 in the places left out.
    """
    log_p = logits - jax.nn.logsumexp(
        jnp.where(left_out, -jnp.inf, logits), -1, keepdims=True
    )
    return jnp.where(left_out, 0.0, log_p)


class DKD(term.LogitTerm):
    """ce_weight CE + weight * `dkd_loss`."""

    weight: float = 1.0
    warmup_epochs: float = 20.0
    alpha: float = fields.field(
        1.0, "of the label against all other classes", fields.at_least(0)
    )
    beta: float = fields.field(
        8.0, "of the others among themselves; by the pair", fields.at_least(0)
    )
    temperature: float = fields.field(4.0, check=fields.above(0))
    standardise: bool = fields.field(
        False, "z-scores of the logits; then temperature=2, weight=9"
    )

    per_example: ClassVar[bool] = True
    two_classes: ClassVar[str | None] = "alpha"
    reads_labels: ClassVar[bool] = True
    pairs: ClassVar[method.Pairs] = {  # beta is 8 elsewhere
        ("vgg*", "*"): {"beta": 6.0},
        ("*", "vgg*"): {"beta": 6.0},
        ("resnet56", "resnet20"): {"beta": 2.0},
        ("resnet110", "resnet32"): {"beta": 2.0},
        ("wrn_40_2", "wrn_16_2"): {"beta": 6.0},
        ("wrn_40_2", "wrn_40_1"): {"beta": 6.0},
        ("resnet32x4", "mobilenet_v2"): {"beta": 6.0},
    }

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `dkd`."""
        given = (*self.logits(signals), signals.labels)
        options = (self.alpha, self.beta, self.temperature)
        return [{"dkd": dkd_loss(*given, *options, signals.valid)}]


METHODS = {"dkd": DKD}
ORDER = 50  # in lists of methods
