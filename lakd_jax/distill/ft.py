"""Factor transfer: match what two small networks make of the features.

Source: Kim et al., "Paraphrasing Complex Network" (arXiv 1802.04977), equations 1 to 4;
paraphraser, translator and reductions of the public benchmark's code (RepDistiller).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import fitnet, tap_attention
from lakd_jax.distill.base import adapter, initial, method, numerics, term
from lakd_jax.distill.base import rules as rules_lib
from lakd_jax.models import layers


def factor_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean absolute difference of attention maps (p1 = 2, p2 = 1 of the public code).

    A map is the mean over channels of squares, its positions divided by their L2 norm.
    (The paper compares normalised factors themselves; the benchmark's code does this.)
    Of two sizes the larger one is pooled to the smaller.

    Args:
      student: (B, H, W, C), the translator's.
      teacher: (B, H', W', C'), the paraphraser's; it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    s, t = adapter.match_size(*numerics.frozen(student, teacher))
    return jnp.mean(numerics.magnitude(_factor(s) - _factor(t)))


def _factor(features: jax.Array) -> jax.Array:
    return numerics.unit(numerics.flat(tap_attention.activation_map(features)))


class _Coder(nn.Module):
    """3x3 convolutions with bias, each with a leaky ReLU (0.1) behind it; float32.

    With larger initial weights than these the paraphraser's training may not hold.
    """

    widths: tuple[int, ...]
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i, width in enumerate(self.widths, 1):
            start = layers.uniform_fan_in
            x = nn.Conv(width, (3, 3), kernel_init=start, name=f"conv{i}")(x)
            if self.norm:
                x = adapter.batch_norm(train=train, name=f"bn{i}")(x)
            x = nn.leaky_relu(x, 0.1)
        return x


class Paraphraser(nn.Module):
    """Three convolutions to the factor and three back, without batch norms.

    The public code's transposed convolutions have stride 1, which makes them plain
    ones.

    Attributes:
      rate: channels of the factor for each of the features'.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, C) -> factor (B, H, W, rate * C) and features again, float32."""
        x = x.astype(jnp.float32)
        wide, narrow = x.shape[-1], _width(x, self.rate)
        widths, back = (wide, narrow, narrow), (narrow, wide, wide)
        factor = _Coder(widths, norm=False, name="encoder")(x, train=False)
        return factor, _Coder(back, norm=False, name="decoder")(factor, train=False)


def _width(x: jax.Array, rate: float) -> int:
    return max(int(x.shape[-1] * rate), 1)


class Factors(nn.Module):
    """Paraphraser of the teacher and translator of the student.

    The paraphraser is trained for a while. What it is then is kept beside the
    parameters, which weight decay goes on moving.

    Attributes:
      rate: see `Paraphraser`.
    """

    rate: float

    @nn.compact
    def __call__(
        self, student: jax.Array, teacher: jax.Array, first: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The two factors, and the features as the paraphraser rebuilds them.

        Args:
          student: (B, H, W, C).
          teacher: (B, H', W', C').
          first: scalar bool, whether the paraphraser is trained in this step.
          train: whether the running statistics and what is kept may change.

        Returns:
          (B, H, W, D) and (B, H', W', D), D = rate * C', and (B, H', W', C'), float32.
        """
        student, teacher = numerics.frozen(student, teacher)
        paraphrase = Paraphraser(self.rate, name="paraphraser")
        if self.is_initializing():
            paraphrase(teacher)
        tree: Any = paraphrase.variables
        own = flax.core.unfreeze(tree["params"])
        kept = self.variable("batch_stats", "kept", lambda: own)
        weights = jax.tree.map(lambda o, k: jnp.where(first, o, k), own, kept.value)
        if train and not self.is_initializing():
            kept.value = jax.lax.stop_gradient(weights)
        free = Paraphraser(self.rate, parent=None)
        made: Any = free.apply({"params": weights}, teacher)
        factor, rebuilt = made
        narrow = factor.shape[-1]
        widths = (student.shape[-1], narrow, narrow)
        translate = _Coder(widths, norm=True, name="translator")
        return translate(student, train=train), factor, rebuilt


class FT(term.Term):
    """ce_weight CE + weight * `factor_loss` of the last stage's features.

    In the first `init_epochs` the paraphraser learns to rebuild the teacher's features
    (mean squared error) and the factors do not count; afterwards it stays as it is.
    In RepDistiller these epochs come on top of the schedule, at a learning rate of
    0.01 for most networks, while the student waits. Here they are part of the schedule
    and the student learns from the labels meanwhile; the share of the schedule's rate
    that the paraphraser has is the weight of its loss, which for SGD is the same
    (0.2 of a rate of 0.05 is 0.01).
    """

    weight: float = 200.0
    rate: float = fields.field(
        0.5, "channels of a factor for each of the teacher's", fields.above(0)
    )
    init_epochs: float = fields.field(
        30.0, "the first ones, in which the paraphraser is trained", fields.at_least(0)
    )
    init_weight: float = fields.field(
        0.2, "of its loss then: the share of optim.lr that it has", fields.at_least(0)
    )

    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        *term.Term.rules,
        rules_lib.room_after_start,
    )
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the terms `ft` and `ft_rebuilt`, the paraphraser's."""
        teacher = signals.teacher_joints[-1]
        student, factor, rebuilt = Factors(self.rate, name="head")(
            signals.student_joints[-1],
            teacher,
            initial.during(signals, self.init_epochs),
            train=train,
        )
        loss = factor_loss(student, factor)
        return [{"ft": loss, "ft_rebuilt": fitnet.hint_loss(rebuilt, teacher)}]

    def weigh(self, signals: method.Signals) -> tuple[Any, jax.Array]:
        """That of the factors is 0 at first; its warm-up begins after that."""
        grown = term.ramp(signals.epoch - self.init_epochs, self.warmup_epochs)
        first = initial.during(signals, self.init_epochs)
        return self.ce_weight, jnp.where(first, 0.0, self.weight * grown)

    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss`; `ft_rebuilt` has `init_weight` at first, then 0."""
        (loss,) = super().__call__(signals, train=train)
        first = initial.during(signals, self.init_epochs)
        weight = jnp.where(first, self.init_weight, 0.0)
        weights = {**loss.weights, "ft_rebuilt": weight}
        return (dataclasses.replace(loss, weights=weights),)


METHODS = {"ft": FT}
ORDER = 230  # in lists of methods
