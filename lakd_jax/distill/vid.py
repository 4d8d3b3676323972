"""Variational information distillation.

Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer" (arXiv
1904.05835), equations 4 to 6; regressor and reduction of the public code.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import adapter, method, numerics, term

_LEAST_VARIANCE = 1e-5


def vid_loss(mean: jax.Array, teacher: jax.Array, scale: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the teacher's features, without its constant.

    That is ((mean - teacher)^2 / v + log v) / 2 of normal distributions with one
    variance v = softplus(scale) + 1e-5 a channel.

    Args:
      mean: (B, H, W, C), what is predicted from the student.
      teacher: (B, H, W, C); it gets no gradient.
      scale: (C,).

    Returns:
      Scalar float32; negative where the variance is small.
    """
    mean, teacher = numerics.frozen(mean, teacher)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(mean.ndim - 1))
    variance = jax.nn.softplus(scale) + _LEAST_VARIANCE
    return jnp.mean((mean - teacher) ** 2 / variance + jnp.log(variance)) / 2


class Regressor(nn.Module):
    """Three 1x1 convolutions without bias, ReLUs between them, and the variances.

    Attributes:
      features: channels of the teacher's map, and of what lies between.
      init_variance: of every channel at first.
    """

    features: int
    init_variance: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, C) -> means (B, H, W, features) and scales (features,), float32."""
        x = x.astype(jnp.float32)
        for i in range(3):
            x = nn.relu(x) if i else x
            x = nn.Conv(self.features, (1, 1), use_bias=False, name=f"conv{i + 1}")(x)
        first = math.log(math.expm1(self.init_variance - _LEAST_VARIANCE))
        start = nn.initializers.constant(first)
        return x, self.param("scale", start, (self.features,))


class VID(term.Term):
    """ce_weight CE + weight * `vid_loss`, in each module its own stage's part.

    Of two sizes the larger features are pooled to the smaller. The variances are
    trained (RepDistiller; they stay as they are in mdistiller).
    """

    weight: float = 1.0
    init_variance: float = fields.field(
        5.0, "of every channel at first; trained", fields.at_least(0.001)
    )

    staged: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `vid`, one per module."""
        terms = []
        pairs = zip(signals.student_joints, signals.teacher_joints, strict=True)
        for k, pair in enumerate(pairs, 1):
            ours, theirs = adapter.match_size(*numerics.frozen(*pair))
            own = Regressor(theirs.shape[-1], self.init_variance, name=f"module{k}")
            mean, scale = own(ours)
            terms.append({"vid": vid_loss(mean, theirs, scale)})
        return terms


METHODS = {"vid": VID}
ORDER = 180  # in lists of methods
