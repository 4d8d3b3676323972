"""DeepKD: DKD with a momentum for each of three losses, and a growing top-k mask.

Source: Huang et al., "DeepKD: A Deeply Decoupled and Denoised Knowledge Distillation
Trainer" (arXiv 2505.15133) and the authors' public code. SGD keeps a momentum buffer
for the labels' losses, for that of "the label or not" (TCKD), and for all others, here
that among the other classes (NCKD), which sees the classes that the teacher ranks
highest. Where paper and code differ, and deviations:

* The momenta are those that paper and settings name. As it runs, the code moves the
  labels' buffer with the momentum of TCKD, which is `task_delta=-0.075` here.
* Weight decay is part of TCKD's gradient, as in the code, but of the parameters before
  the step; the code decays what the other two buffers have moved already.
* The code's number of classes is constant, and 0, which is all of them, in its settings
  for CIFAR. The paper's grows during the training, from few classes; here it does so
  linearly, unless `shares` and `share_epochs` have it otherwise.
* Classes that tie with the last one count, too, and there are always two, since one of
  them may be the label.
* The code's variant on KD, NCKD times one minus the teacher's probability of the label,
  is not here.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill import dkd
from lakd_jax.distill.base import method, numerics
from lakd_jax.distill.base import rules as rules_lib

_LEAST = 2  # classes; the label may be one of them


def tckd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: float,
) -> jax.Array:
    """T^2 * mean KL of "the label or not", the first term of `dkd.dkd_loss`.

    The teacher gets no gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      temperature: T > 0.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    label = jax.nn.one_hot(labels, student_logits.shape[-1], dtype=bool)
    student, teacher = (
        logits / temperature
        for logits in numerics.frozen(student_logits, teacher_logits)
    )
    return temperature**2 * jnp.mean(dkd.tckd(student, teacher, label))


def nckd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: float,
    top: jax.Array | int,
) -> jax.Array:
    """T^2 * mean KL among the teacher's `top` classes without the label.

    With all classes it is the second term of `dkd.dkd_loss`. The teacher gets no
    gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      temperature: T > 0.
      top: how many, from 2 to all classes; may be traced.

    Returns:
      Scalar float32, never negative but for rounding.
    """
    student, teacher = numerics.frozen(student_logits, teacher_logits)
    label = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)
    left_out = label | ~highest(teacher, top)
    student, teacher = (logits / temperature for logits in (student, teacher))
    return temperature**2 * jnp.mean(dkd.nckd(student, teacher, left_out))


def highest(logits: jax.Array, top: jax.Array | int) -> jax.Array:
    """Marks the `top` highest logits of each row, and those that tie with the last.

    Args:
      logits: (B, classes).
      top: how many, at least 1; may be traced.

    Returns:
      (B, classes) bool.
    """
    last = jnp.take(jnp.sort(logits, -1), logits.shape[-1] - top, -1)
    return logits >= last[:, None]


def _schedule(options: Any, run: rules_lib.Run) -> str:
    """Checks that each share has its epoch, and that these ascend."""
    shares, epochs = options.shares, options.share_epochs
    if len(shares) != len(epochs):
        return (
            f"{run.method}.shares has {len(shares)} entries, but "
            f"{run.method}.share_epochs {len(epochs)}: give an epoch for each share"
        )
    if list(epochs) != sorted(set(epochs)):
        return f"{run.method}.share_epochs must ascend, is {tuple(epochs)!r}"
    return ""


class DeepKD(dkd.DKD):
    """ce_weight CE + weight * (alpha `tckd_loss` + beta `nckd_loss`)."""

    shares: tuple[float, ...] = fields.field(
        (0.05, 1.0),
        "of the classes, the teacher's highest, that beta's loss sees at share_epochs; "
        "linear between them. (1,) at (0,): always all",
        fields.some(fields.between(0, 1)),
    )
    share_epochs: tuple[float, ...] = fields.field(
        (0.0, 240.0), "counted from 0", fields.some(fields.at_least(0))
    )
    task_delta: float = fields.field(
        0.075,
        "added to optim.momentum for the labels' losses; as the public code runs: "
        "-0.075",
        fields.inside(-1, 1),
    )
    target_delta: float = fields.field(
        -0.075, "the same for what alpha weighs", fields.inside(-1, 1)
    )
    others_delta: float = fields.field(
        0.075,
        "the same for all other losses; by the pair. All three 0: one momentum, any "
        "optimiser",
        fields.inside(-1, 1),
    )

    title: ClassVar[str] = "DeepKD"
    per_example: ClassVar[bool] = False  # its means are over all rows
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (*dkd.DKD.rules, _schedule)
    momenta: ClassVar[tuple[method.Momentum, ...]] = (
        method.Momentum("task", "task_delta", method.TASK),
        method.Momentum("target", "target_delta", ("tckd",), decays=True),
        method.Momentum("others", "others_delta"),
    )
    pairs: ClassVar[method.Pairs] = {
        ("*", "shuffle_v1"): {"others_delta": 0.085},
        ("*", "mobilenet_v2"): {"others_delta": 0.08},
        ("vgg13", "mobilenet_v2"): {"beta": 1.0},
        ("wrn_40_2", "mobilenet_v2"): {"alpha": 1.5, "beta": 4.0},
        ("cifar_resnet50", "mobilenet_v2"): {
            "beta": 2.0,
            "target_delta": -0.1,
            "others_delta": 0.025,
        },
        ("vgg13", "vgg8"): {"beta": 6.0, "others_delta": 0.025},
        ("resnet56", "resnet20"): {"beta": 0.5},
        ("resnet110", "resnet20"): {
            "beta": 2.0,
            "target_delta": -0.1,
            "others_delta": 0.05,
        },
        ("resnet110", "resnet32"): {"beta": 3.0, "others_delta": 0.0},
        ("resnet32x4", "resnet8x4"): {"others_delta": 0.05},
        ("resnet32x4", "wrn_40_2"): {"others_delta": 0.05},
        ("resnet32x4", "wrn_16_2"): {"target_delta": -0.1, "others_delta": 0.05},
        ("wrn_40_2", "resnet8x4"): {"beta": 4.0, "others_delta": 0.05},
        ("wrn_40_2", "wrn_16_2"): {"target_delta": -0.1, "others_delta": 0.05},
        ("wrn_40_2", "wrn_40_1"): {
            "beta": 4.0,
            "target_delta": -0.1,
            "others_delta": 0.05,
        },
    }

    def top(self, epoch: jax.Array, classes: int) -> jax.Array:
        """Returns how many classes take part in an epoch, scalar int32."""
        at, shares = jnp.float32(self.share_epochs), jnp.float32(self.shares)
        count = jnp.round(jnp.interp(epoch, at, shares) * classes)
        return jnp.maximum(count, _LEAST).astype(jnp.int32)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the terms `tckd` and `nckd`, with `alpha` and `beta`."""
        given = (*self.logits(signals), signals.labels, self.temperature)
        top = self.top(signals.epoch, signals.student.logits.shape[-1])
        terms = {
            "tckd": self.alpha * tckd_loss(*given),
            "nckd": self.beta * nckd_loss(*given, top),
        }
        return [terms]


METHODS = {"deepkd": DeepKD}
ORDER = 360  # in lists of methods
