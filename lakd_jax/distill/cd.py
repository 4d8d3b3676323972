"""Channel distillation: how strongly each channel responds, compared.

Source: Zhou et al., "Channel Distillation: Channel-Wise Attention for Knowledge
Distillation" (arXiv 2006.01683): channel distillation, guided knowledge distillation
and the early decay of the teacher; reductions of the public code.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import adapter, method, numerics, term


def channel_loss(
    student_features: Sequence[jax.Array], teacher_features: Sequence[jax.Array]
) -> jax.Array:
    """Sum over stages of the mean squared difference of channels' means.

    Args:
      student_features: (B, H, W, C) each, through its connector.
      teacher_features: as many, (B, H', W', C) each; they get no gradient.

    Returns:
      Scalar float32, never negative.
    """
    total = jnp.float32(0)
    for pair in zip(student_features, teacher_features, strict=True):
        student, teacher = (jnp.mean(x, (1, 2)) for x in numerics.frozen(*pair))
        total += jnp.mean((student - teacher) ** 2)
    return total


def guided_kd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: float,
) -> jax.Array:
    """T^2 * mean KL(teacher || student) of the examples that the teacher gets right.

    Without any such example it is 0, where the public code has 0 / 0. (That code also
    takes probabilities that round to 0 for 1.)

    Args:
      student_logits: (B, classes), any floating type.
      teacher_logits: (B, classes), any floating type; they get no gradient.
      labels: (B,) integers.
      temperature: T > 0; 1 in the public code.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    log_s, log_t = (jax.nn.log_softmax(x / temperature) for x in (student, teacher))
    divergence = numerics.divergence(log_t, log_s)
    right = jnp.argmax(teacher, -1) == labels
    count = jnp.maximum(jnp.sum(right), 1)
    return temperature**2 * jnp.sum(jnp.where(right, divergence, 0.0)) / count


class CD(term.Term):
    """ce_weight CE + weight * `channel_loss` + gkd_weight * `guided_kd_loss`.

    In each module the channels of its own stage; the guided part is the last one's.
    The student's features first pass a connector, also where widths agree: 1x1
    convolution, batch norm and ReLU (`adapter.Adapter`, whose initial weights are
    ours). Sizes need not agree.

    In the first `alone_epochs` CE and the guided part have no weight. This is what the
    public code's early decay does beside the decay.
    """

    weight: float = 6.0
    gkd_weight: float = fields.field(
        0.1, "of KD where the teacher is right; 1 on ImageNet", fields.at_least(0)
    )
    temperature: float = fields.field(1.0, "of the same", fields.above(0))
    decay: float = fields.field(
        0.9,
        "Early decay is off. As published for 200 epochs: decay_epochs=(60,160), "
        "alone_epochs=60. of weight, at each of decay_epochs",
        fields.between(0, 1),
    )
    decay_epochs: tuple[float, ...] = fields.field(
        (), "counted from 1", fields.each(fields.above(0))
    )
    alone_epochs: float = fields.field(
        0.0, "before labels and logits count", fields.at_least(0)
    )

    staged: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("logits", "joints")

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `cd`, one per module."""
        pairs = zip(signals.student_joints, signals.teacher_joints, strict=True)
        own = []
        for k, (ours, theirs) in enumerate(pairs, 1):
            connect = adapter.Adapter(theirs.shape[-1], name=f"module{k}")
            ours = nn.relu(connect(ours, train=train))
            own.append({"cd": channel_loss([ours], [theirs])})
        return own

    def weigh(self, signals: method.Signals) -> tuple[Any, Any]:
        """The weights of cross-entropy and of the channels in this step."""
        hard, weight = super().weigh(signals)
        decays = jnp.asarray(self.decay_epochs, jnp.float32)
        passed = jnp.sum(_epoch(signals) >= decays)
        return hard * self._labelled(signals), weight * self.decay**passed

    def _labelled(self, signals: method.Signals) -> jax.Array:
        return (_epoch(signals) > self.alone_epochs).astype(jnp.float32)

    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss` per module, the last with `head_ce` and `gkd`."""
        *before, last = super().__call__(signals, train=train)
        logits = signals.student.logits, signals.teacher.logits
        gkd = guided_kd_loss(*logits, signals.labels, self.temperature)
        warm = term.ramp(signals.epoch, self.warmup_epochs)
        weight = self.gkd_weight * warm * self._labelled(signals)
        return *before, last.plus("gkd", gkd, weight)


def _epoch(signals: method.Signals) -> jax.Array:
    """The epoch that is run, counted from 1."""
    return jnp.floor(signals.epoch) + 1


METHODS = {"cd": CD}
ORDER = 300  # in lists of methods
