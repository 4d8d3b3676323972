"""One for all: every stage of the student answers by itself, as the teacher does.

Source: Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in
Knowledge Distillation" (arXiv 2310.19444), equation 5, and the authors' public code.
Each stage has a head of its own, so that only logits are compared: the networks need
not have maps in common, and a student that is cut learns in every module. Deviations
from the public code:

* It knows four stages at 224x224, which each halve the map. Here a head halves the map
  as often as the student does after it, which is the same there, and works for any
  number of stages and for cuts between them.
* The cross-entropy's smoothing is `label_smoothing`; gradients are not clipped unless
  `optim.clip_norm` is set.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import adapter, method, numerics, term
from lakd_jax.distill.base import rules as rules_lib
from lakd_jax.models import layers


def ofa_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    eps: float,
    temperature: float = 1.0,
) -> jax.Array:
    """Mean over the batch of -sum_c ((p_t + y)^eps - y) log p_s, y the one-hot label.

    With eps = 1 it is the cross-entropy with the teacher, in which the label has no
    part; larger ones raise the weight of the label, to (1 + p_t)^eps - 1, and lower
    those of the others. Without T^2; the teacher gets no gradient.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      eps: above 0; 1 to 1.5 in the public code.
      temperature: T > 0, of both.

    Returns:
      Scalar float32, never negative.
    """
    both = numerics.frozen(student_logits, teacher_logits)
    log_s, log_t = (jax.nn.log_softmax(logits / temperature) for logits in both)
    label = jax.nn.one_hot(labels, student_logits.shape[-1])
    weights = (jnp.exp(log_t) + label) ** eps - label
    return -jnp.mean(jnp.sum(weights * log_s, -1))


class SeparableConv(nn.Module):
    """Depthwise 3x3, pointwise, norm, ReLU, twice; halves the map. Float32.

    Attributes:
      features: channels that leave it.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / 2, W / 2, features), halves rounded up."""
        style, width = layers.Style(), x.shape[-1]
        for i, (features, stride) in enumerate([(width, 2), (self.features, 1)], 1):
            depthwise = {"groups": width, "name": f"depthwise{i}"}
            x = layers.conv(width, 3, stride, style, **depthwise)(x)
            x = layers.conv(features, 1, 1, style, name=f"pointwise{i}")(x)
            x = nn.relu(adapter.batch_norm(train=train, name=f"bn{i}")(x))
        return x


class StageHead(nn.Module):
    """From the map at a joint to logits.

    Attributes:
      halvings: how often the map is halved, by a `SeparableConv` each; they double the
        channels, but the last has `width`. 0: a 1x1 convolution with bias.
      width: channels that are pooled.
      classes: of the logits.
    """

    halvings: int
    width: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, classes) float32."""
        x = x.astype(jnp.float32)
        channels = x.shape[-1]
        for i in range(1, self.halvings + 1):
            features = channels * 2**i if i < self.halvings else self.width
            x = SeparableConv(features, name=f"sep{i}")(x, train=train)
        if not self.halvings:
            x = layers.conv(self.width, 1, 1, layers.Style(), name="conv", bias=True)(x)
        dense = nn.Dense(self.classes, kernel_init=layers.token_normal, name="dense")
        return dense(jnp.mean(x, (1, 2)))


def halvings(side: int, last: int) -> int:
    """Returns how often a map is halved from one side to that of the last map."""
    return max(round(math.log2(side / last)), 0)


def _one_or_all(options: Any, run: rules_lib.Run) -> str:
    """Checks the number of exponents; reads the cut only if there are several."""
    count = len(options.eps)
    if count == 1 or count == len(run.modules) + 1:
        return ""
    return (
        f"ofa.eps has {count} entries, but the student has {len(run.modules)} modules: "
        "give one for all, or one for each module and one for the logits"
    )


def _known_width(options: Any, run: rules_lib.Run) -> str:
    if options.width or not run["teacher.views"]:
        return ""
    _, ours, theirs = run.joints[-1]
    return (
        "ofa.width is 0, the larger of both networks' pooled widths, but teacher.views "
        "stores logits alone: set teacher.views to 0, or ofa.width to that number (the "
        f"last maps have {ours[-1]} and {theirs[-1]} channels)"
    )


class OFA(term.Term):
    """ce_weight CE + weight * (`ofa_loss` of each module's `StageHead`, and of logits).

    Terms: `ofa` in every module, `ofa_logits` in the last. The heads are trained with
    the student and dropped after. The student's last module learns from its own head,
    from the logits and from the labels.
    """

    weight: float = 1.0
    eps: tuple[float, ...] = fields.field(
        (1.0,),
        "weight of the label: one for all, or one for each module and one for the "
        "logits; mostly 1.1 to 1.4, more for weaker teachers",
        fields.some(fields.above(0)),
    )
    temperature: float = fields.field(1.0, check=fields.above(0))
    width: int = fields.field(
        0,
        "channels that the modules' heads pool; 0: as both networks pool, the larger",
        fields.at_least(0),
    )

    staged: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        *term.Term.rules,
        _one_or_all,
        _known_width,
    )

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `ofa`, one per module, and `ofa_logits` in the last."""
        student, joints = signals.student, signals.student_joints
        eps = self.eps * (len(joints) + 1) if len(self.eps) == 1 else self.eps
        width = self.width
        if not width:  # only the shape is read, so stored logits do with a given width
            width = max(student.pooled.shape[-1], signals.teacher.pooled.shape[-1])
        classes, side = student.logits.shape[-1], joints[-1].shape[1]
        terms = []
        for k, joint in enumerate(joints):
            halved = halvings(joint.shape[1], side)
            head = StageHead(halved, width, classes, name=f"module{k + 1}")
            logits = head(joint, train=train)
            terms.append({"ofa": self._loss(logits, signals, eps[k])})
        terms[-1]["ofa_logits"] = self._loss(student.logits, signals, eps[-1])
        return terms

    def _loss(self, logits: jax.Array, signals: method.Signals, eps: float) -> Any:
        given = (logits, signals.teacher.logits, signals.labels)
        return ofa_loss(*given, eps, self.temperature)


METHODS = {"ofa": OFA}
ORDER = 330  # in lists of methods
