"""Binary losses, one yes-or-no task per class, with and without a teacher.

Source: KDExplainer (arXiv 2105.04181) treats a multi-class task as many binary ones.
The released code does not include the losses, so they are our interpretation: with a_k
the two units of the head of class k and d_k = a_k[1] - a_k[0],

    hard_k = 2-way cross-entropy of a_k against [y == k]
    q      = softmax(teacher / T)
    soft_k = T^2 KL([1 - q_k, q_k] || softmax(a_k / T))
    L      = mean over classes of ce_weight hard_k + kd_weight soft_k

The softmax over two units depends only on d_k: its second entry is the logistic
function of d_k / T. So networks return d_k as their logits (`hme.network.HME` with
output "odds"), and the prediction is the class of the largest. The released code starts
a sum over classes; the mean keeps learning rates usable for many classes.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.distill.base import method, numerics


def binary_cross_entropy(
    odds: jax.Array, labels: jax.Array, positive_weight: float
) -> jax.Array:
    """Computes the mean of hard_k over images and classes; our interpretation.

    Args:
      odds: (B, classes) d_k, any floating type.
      labels: (B,) integers.
      positive_weight: factor on the true class, one of `classes`; 1 gives the plain
        formula.

    Returns:
      Scalar float32, never negative.
    """
    odds = odds.astype(jnp.float32)
    yes = jax.nn.one_hot(labels, odds.shape[-1], dtype=jnp.float32)
    each = positive_weight * yes * nn.softplus(-odds) + (1 - yes) * nn.softplus(odds)
    return jnp.mean(each)


def binary_kd(
    odds: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    """Computes the mean of soft_k over images and classes; our interpretation.

    The teacher gets no gradient.

    Args:
      odds: (B, classes) d_k, any floating type.
      teacher_logits: (B, classes), any floating type.
      temperature: T > 0.

    Returns:
      Scalar float32, never negative.
    """
    odds = odds.astype(jnp.float32) / temperature
    teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32) / temperature
    q = jax.nn.softmax(teacher)
    xlogx = jax.scipy.special.xlogy
    cross = q * nn.log_sigmoid(odds) + (1 - q) * nn.log_sigmoid(-odds)
    divergence = xlogx(q, q) + xlogx(1 - q, 1 - q) - cross
    return temperature**2 * jnp.mean(numerics.not_negative(divergence))


class BinaryPlain(method.Method):
    """Trains without a teacher, on the term `head_ce` (`binary_cross_entropy`)."""

    positive_weight: float

    needs_teacher: ClassVar[bool] = False
    teacher_reads: ClassVar[tuple[str, ...]] = ()

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns a single `ModuleLoss`."""
        odds, labels = signals.student.logits, signals.labels
        terms = {"head_ce": binary_cross_entropy(odds, labels, self.positive_weight)}
        return (
            method.ModuleLoss(terms=terms, weights={"head_ce": 1.0}, diagnostics={}),
        )


class BinaryKD(method.Method):
    """Sums the terms `head_ce` (`binary_cross_entropy`) and `head_kd` (`binary_kd`)."""

    ce_weight: float
    kd_weight: float
    temperature: float
    positive_weight: float

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns a single `ModuleLoss`."""
        odds, labels = signals.student.logits, signals.labels
        terms = {
            "head_ce": binary_cross_entropy(odds, labels, self.positive_weight),
            "head_kd": binary_kd(odds, signals.teacher.logits, self.temperature),
        }
        weights = {"head_ce": self.ce_weight, "head_kd": self.kd_weight}
        return (method.ModuleLoss(terms=terms, weights=weights, diagnostics={}),)
