"""Curriculum temperature: KD whose temperature is learned against the student.

Source: Li et al., "Curriculum Temperature for Knowledge Distillation" (arXiv
2211.16231), the global temperature, and the authors' public code. The temperature
climbs the loss that the student descends, and does so faster as epochs go by. The
paper's temperature of each example (by a small network) is not built.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import kd
from lakd_jax.distill.base import method, term


def reversal(epoch: jax.Array, low: float, high: float, epochs: float) -> jax.Array:
    """lambda, along half a cosine from `low` to `high`, then there.

    It is constant within an epoch, and counts these from 1, as the public code does.

    Args:
      epoch: epochs begun since the start, with fractions, from 0.
      low, high: before the first epoch and from `epochs` on.
      epochs: above 0.
    """
    share = jnp.minimum((jnp.floor(epoch) + 1) / epochs, 1.0)
    return low + (high - low) * (1 - jnp.cos(jnp.pi * share)) / 2


def ctkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    raw: jax.Array,
    reversal: jax.Array | float,
    lowest: float,
    span: float,
) -> jax.Array:
    """`kd.kd_loss` at T = lowest + span sigmoid(raw), with raw's gradient reversed.

    Args:
      student_logits: (B, classes), any floating type.
      teacher_logits: (B, classes), any floating type; no gradient but to T.
      raw: scalar, the parameter.
      reversal: lambda >= 0; raw's gradient is -lambda times the loss's.
      lowest, span: T is between lowest and lowest + span.

    Returns:
      Scalar float32, never negative.
    """
    still = jax.lax.stop_gradient(raw)
    reversed_raw = still - reversal * (raw - still)
    temperature = lowest + span * jax.nn.sigmoid(reversed_raw)
    return kd.kd_loss(student_logits, teacher_logits, temperature)


class _Raw(nn.Module):
    """The parameter behind the temperature, 1 at first as in the public code."""

    @nn.compact
    def __call__(self) -> jax.Array:
        """Scalar float32."""
        return self.param("raw_temperature", nn.initializers.ones, (), jnp.float32)


class CTKD(term.LogitTerm):
    """ce_weight CE + weight * `ctkd_loss`.

    The parameter is trained by the optimiser of the last module, weight decay
    included, as in the public code.
    """

    ce_weight: float = 0.1
    weight: float = 0.9
    temperature_min: float = fields.field(
        1.0, "the learned temperature is from here", fields.above(0)
    )
    temperature_span: float = fields.field(20.0, "to so much more", fields.at_least(0))
    lambda_min: float = fields.field(
        0.0,
        "share of the temperature's gradient that is reversed, at first",
        fields.at_least(0),
    )
    lambda_max: float = fields.field(1.0, "and in the end", fields.at_least(0))
    lambda_epochs: float = fields.field(
        10.0, "from the first to the last, along a cosine", fields.above(0)
    )
    standardise: bool = fields.field(False, "z-scores of the logits; then weight=9")

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `ctkd`."""
        raw = _Raw(name="head")()
        schedule = (self.lambda_min, self.lambda_max, self.lambda_epochs)
        factor = reversal(signals.epoch, *schedule)
        bounds = (self.temperature_min, self.temperature_span)
        return [{"ctkd": ctkd_loss(*self.logits(signals), raw, factor, *bounds)}]


METHODS = {"ctkd": CTKD}
ORDER = 110  # in lists of methods
