"""Overhaul of feature distillation: the partial L2 loss behind a margin ReLU.

Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation" (arXiv
1904.01866), equations 2 and 3; the public code's reduction, connectors and weights of
stages.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.distill.base import adapter, method, numerics, term


def margin_loss(student: jax.Array, teacher: jax.Array, margin: jax.Array) -> jax.Array:
    """Squared errors where they count: mean over the batch, sum over the rest.

    The teacher's response is max(teacher, margin). A position counts where that is
    above 0, or where the student is above it.

    Args:
      student: (B, H, W, C), through its connector.
      teacher: (B, H, W, C) before the last ReLU; it gets no gradient.
      margin: the negative margin of each channel, (C,) or anything that broadcasts.

    Returns:
      Scalar float32, never negative.
    """
    source, target = numerics.frozen(student, teacher)
    target = jnp.maximum(target, jnp.broadcast_to(margin, target.shape))
    counts = (source > target) | (target > 0)
    errors = jnp.where(counts, (source - target) ** 2, 0.0)
    return jnp.sum(errors) / len(source)


class Margin(nn.Module):
    """The expected negative response of each channel, E[x | x < 0] (section 3.2).

    The public code works it out from scale and bias of the teacher's last batch norm,
    as if responses were Gaussian. Teachers here have their norms folded into the
    convolutions, so the mean over all that was seen so far is used instead (our
    interpretation). A channel that was never negative has margin 0, which does not
    alter it; the code has -3 deviations where less than a thousandth is negative.
    """

    @nn.compact
    def __call__(self, responses: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) before the ReLU -> (C,) float32, never positive, no gradient."""
        x = jax.lax.stop_gradient(responses).astype(jnp.float32)
        width = x.shape[-1:]
        batches = self.variable("batch_stats", "batches", jnp.zeros, ())
        negative = self.variable("batch_stats", "negative", jnp.zeros, width)
        share = self.variable("batch_stats", "share", jnp.zeros, width)
        if train and not self.is_initializing():
            batches.value += 1
            # Means of the two separately: batches with few negatives count for less.
            for mean, sample in ((negative, jnp.minimum(x, 0.0)), (share, x < 0)):
                seen = jnp.mean(sample, axis=(0, 1, 2), dtype=jnp.float32)
                mean.value += (seen - mean.value) / batches.value
        return negative.value / jnp.where(share.value > 0, share.value, 1.0)


class Stage(nn.Module):
    """The loss of one stage, with its connector and its margin.

    The connector is `adapter.Adapter`, a 1x1 convolution and batch norm as in the
    public code but for its initialisation (there normal by the fan-out).
    """

    @nn.compact
    def __call__(
        self, student: jax.Array, teacher: jax.Array, *, train: bool
    ) -> jax.Array:
        """`margin_loss` of (B, H, W, C) and (B, H', W', C'), scalar float32.

        The larger is pooled to the smaller; the public code pools the teacher's to
        the student's size, which repeats its values where the student's is larger.
        """
        margin = Margin(name="margin")(teacher, train=train)
        connector = adapter.Adapter(teacher.shape[-1], name="connector")
        pair = adapter.match_size(connector(student, train=train), teacher)
        return margin_loss(*pair, margin)


class OFD(term.Term):
    """ce_weight CE + weight * `margin_loss` of every stage's pre-activations.

    The last module's loss counts whole, each one before it half as much as the next.
    """

    weight: float = 0.001

    staged: ClassVar[bool] = True
    needs_preacts: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("preacts",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `ofd`, one per module, halved before the last."""
        pairs = zip(signals.student_preacts, signals.teacher_preacts, strict=True)
        last = len(signals.student_preacts)
        return [
            {"ofd": Stage(name=f"module{k}")(*pair, train=train) / 2 ** (last - k)}
            for k, pair in enumerate(pairs, 1)
        ]


METHODS = {"ofd": OFD}
ORDER = 250  # in lists of methods
