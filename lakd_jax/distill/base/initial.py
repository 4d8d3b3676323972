"""Methods whose own loss comes before the cross-entropy, not along with it."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill.base import method, term
from lakd_jax.distill.base import rules as rules_lib


def during(signals: method.Signals, epochs: float) -> jax.Array:
    """Whether this step is in the first `epochs` of training, scalar bool."""
    return signals.epoch < epochs


class Initial(term.Term, kw_only=True):
    """weight * (the losses) in the first epochs, ce_weight CE in the others.

    As in RepDistiller, where the first epochs come on top of the schedule, with an
    optimiser of their own at the first learning rate and without the classifier. Here
    they are part of the schedule: `init_epochs` fewer are left for the labels, the
    momentum goes on, and the weight decay moves the classifier meanwhile.

    Attributes:
      init_epochs: how many; 30 in the public code.
    """

    init_epochs: float = fields.field(
        30.0,
        "the first ones, in which it counts and the labels do not",
        fields.at_least(0),
    )

    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        *term.Term.rules,
        rules_lib.room_after_start,
    )

    def weigh(self, signals: method.Signals) -> tuple[jax.Array, jax.Array]:
        """Returns both weights, of which one is 0 in this step."""
        hard, weight = super().weigh(signals)
        first = during(signals, self.init_epochs)
        return jnp.where(first, 0.0, hard), jnp.where(first, weight, 0.0)
