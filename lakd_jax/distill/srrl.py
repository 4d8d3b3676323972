"""SRRL: the student's features, read by the teacher's classifier.

Source: Yang et al., "Knowledge Distillation via Softmax Regression Representation
Learning" (ICLR 2021) and the author's public code for ImageNet. A second public code,
beside SimKD, differs: it pools the student's map before the connector and not after it,
which gives other values (`pool_first`). Deviations from both:

* Features are what the teacher's classifier receives. For networks whose last map it
  is the mean of, this is the same; a wide ResNet's are those behind its last norm and
  ReLU, and not its signed map.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import adapter, method, numerics, term
from lakd_jax.distill.base import rules as rules_lib
from lakd_jax.models import layers


def statistics_loss(u: jax.Array, v: jax.Array) -> jax.Array:
    """Mean squared difference of the means over positions.

    Args:
      u: (B, H, W, C), or (B, C) that are such means.
      v: (B, H', W', C) or (B, C); it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    ours, theirs = map(_pooled, numerics.frozen(u, v))
    return jnp.mean((ours - theirs) ** 2)


def _pooled(x: jax.Array) -> jax.Array:
    """(B, H, W, C) or (B, C) as (B, C)."""
    return jnp.mean(x, (1, 2)) if x.ndim == 4 else x


def regression_loss(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Mean squared difference of logits (B, classes); the teacher gets no gradient."""
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    return jnp.mean((student - teacher) ** 2)


class Connector(nn.Module):
    """1x1 convolution without bias, batch norm, ReLU; float32.

    Attributes:
      features: that the teacher's classifier takes.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, features)."""
        style = layers.Style()
        x = x.astype(jnp.float32)
        x = layers.conv(self.features, 1, 1, style, name="conv")(x)
        return nn.relu(adapter.batch_norm(train=train, name="bn")(x))


class SRRL(term.Term):
    """ce_weight CE + weight * (alpha `statistics_loss` + beta `regression_loss`).

    Both of what the connector makes of the student's last map; its logits are those
    that the teacher's classifier gives for it.
    """

    weight: float = 1.0
    alpha: float = fields.field(
        1.0, "of the features; 1 or 10 on CIFAR-100", fields.at_least(0)
    )
    beta: float = fields.field(
        1.0, "of the logits; 1 or 5 on CIFAR-100", fields.at_least(0)
    )
    pool_first: bool = fields.field(
        False, "the connector gets the mean of the student's map, as in SimKD's copy"
    )

    about: ClassVar[str] = "ImageNet's; those of CIFAR-100 were searched for each pair"
    least_batch: ClassVar[int] = 2
    teacher_reads: ClassVar[tuple[str, ...]] = ("logits", "pooled", "classifier")
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        *term.Term.rules,
        rules_lib.linear_teacher,
    )

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `srrl`.

        Raises:
          errors.TeacherError: the teacher does not end in one linear layer.
        """
        matrix, bias = jax.lax.stop_gradient(signals.teacher_classifier())
        ours = signals.student_joints[-1].astype(jnp.float32)
        if self.pool_first:
            ours = jnp.mean(ours, (1, 2), keepdims=True)
        ours = Connector(len(matrix), name="head")(ours, train=train)
        highest = jax.lax.Precision.HIGHEST
        logits = jnp.matmul(jnp.mean(ours, (1, 2)), matrix, precision=highest)
        logits += jnp.expand_dims(bias, 0)
        statistics = statistics_loss(ours, signals.teacher.pooled)
        regression = regression_loss(logits, signals.teacher.logits)
        return [{"srrl": self.alpha * statistics + self.beta * regression}]


METHODS = {"srrl": SRRL}
ORDER = 340  # in lists of methods
