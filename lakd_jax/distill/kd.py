"""Plain training and Hinton's knowledge distillation; both see the logits only.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network"
(arXiv 1503.02531), section 2. Softmax and losses are float32 whatever the
compute type of the networks.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import labels, method, numerics

# Scripts read these here; within the package `Signals.cross_entropy` selects one.
cross_entropy = labels.cross_entropy
smoothed_cross_entropy = labels.smoothed_cross_entropy


def kd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: jax.Array | float,
    where: jax.Array | None = None,
) -> jax.Array:
    """T^2 * mean over the batch of KL(p_T || p_S), p = softmax(logits / T).

    T^2 keeps the gradient's size when T changes (Hinton, end of section 2). The
    teacher gets no gradient; T does if it is an array.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      temperature: T > 0.
      where: (B,) bool, the examples that count; None for all.

    Returns:
      Scalar float32, never negative.
    """
    both = numerics.frozen(student_logits, teacher_logits)
    log_s, log_t = (jax.nn.log_softmax(logits / temperature) for logits in both)
    divergence = numerics.not_negative(numerics.divergence(log_t, log_s))
    return temperature**2 * jnp.mean(divergence, where=where)


def standardised(logits: jax.Array) -> jax.Array:
    """Z-scores of each row: minus its mean, by its standard deviation (of N - 1).

    Sun et al., "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427),
    algorithm 1 and the public code; the temperature then is the paper's base
    temperature. Rows of equal logits give zeros and, unlike there, no gradient, which
    would be of the size of 1e7.

    Args:
      logits: (B, classes), any floating type.

    Returns:
      (B, classes) float32.
    """
    logits = logits.astype(jnp.float32)
    centred = logits - jnp.mean(logits, -1, keepdims=True)
    variance = jnp.sum(centred**2, -1, keepdims=True) / (logits.shape[-1] - 1)
    varied = variance > 0
    deviation = jnp.sqrt(jnp.where(varied, variance, 1.0))
    return jnp.where(varied, centred / (deviation + 1e-7), 0.0)


def head_terms(
    signals: method.Signals,
    ce_weight: float,
    kd_weight: float,
    temperature: float,
    standardise: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, float]]:
    """Terms and weights of ce_weight * CE(labels) + kd_weight * KD on the logits.

    Returns:
      `head_ce` and `head_kd`, scalars float32, and the two weights by these names.
    """
    logits, target = signals.student.logits, signals.teacher.logits
    terms = {"head_ce": signals.cross_entropy(logits)}
    if standardise:
        logits, target = standardised(logits), standardised(target)
    terms["head_kd"] = kd_loss(logits, target, temperature, signals.valid)
    return terms, {"head_ce": ce_weight, "head_kd": kd_weight}


class Plain(method.Method):
    """No teacher: cross-entropy with the labels in the one and last module."""

    title: ClassVar[str] = "alone"
    per_example: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    teacher_reads: ClassVar[tuple[str, ...]] = ()

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss` with the term `head_ce`."""
        terms = {"head_ce": signals.cross_entropy(signals.student.logits)}
        return (
            method.ModuleLoss(terms=terms, weights={"head_ce": 1.0}, diagnostics={}),
        )


class KD(method.Method):
    """ce_weight * CE(labels) + kd_weight * T^2 KL(teacher || student).

    The logits of the divergence are standardised as in `standardised`.
    """

    ce_weight: float = fields.field(
        0.1, "of the cross-entropy with the labels", fields.at_least(0)
    )
    kd_weight: float = fields.field(
        0.9, "of the softened divergence to the teacher", fields.at_least(0)
    )
    temperature: float = fields.field(4.0, check=fields.above(0))
    standardise: bool = fields.field(
        False, "z-scores of the logits; then temperature=2, kd_weight=9"
    )

    per_example: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss` with the terms `head_ce` and `head_kd`."""
        terms, weights = head_terms(
            signals,
            self.ce_weight,
            self.kd_weight,
            self.temperature,
            self.standardise,
        )
        return (method.ModuleLoss(terms=terms, weights=weights, diagnostics={}),)


METHODS = {"none": Plain, "kd": KD}
ORDER = 10  # in lists of methods
