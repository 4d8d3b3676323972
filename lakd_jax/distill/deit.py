"""Token distillation of DeiT: a token and a head of the student's learn the teacher.

Source: Touvron et al., "Training data-efficient image transformers & distillation
through attention" (arXiv 2012.12877), section 4, and its public code. At test time the
logits are the mean of both heads, as for every distilled DeiT.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields, models
from lakd_jax.distill import kd
from lakd_jax.distill.base import method, numerics, term
from lakd_jax.distill.base import rules as rules_lib


def token_loss(
    distillation_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    hard: bool,
    temperature: float = 1.0,
) -> jax.Array:
    """The loss of the distillation token's head.

    Hard: cross-entropy with the class that the teacher answers. Soft: T^2 KL(p_T ||
    p_S), p = softmax(logits / T), divided by the number of classes as well as by that
    of examples, as the public code does, so that it is that much smaller than
    `kd.kd_loss`.

    Args:
      distillation_logits: (B, classes), of the student's second head.
      teacher_logits: (B, classes); it gets no gradient.
      hard: which.
      temperature: T > 0, of the soft loss.

    Returns:
      Scalar float32, never negative.
    """
    student, teacher = numerics.frozen(distillation_logits, teacher_logits)
    if hard:
        return kd.cross_entropy(student, jnp.argmax(teacher, -1))
    return kd.kd_loss(student, teacher, temperature) / student.shape[-1]


def _two_heads(options: Any, run: rules_lib.Run) -> str:
    name = run["student.name"]
    if len(getattr(models.family(name), "HEADS", ())) == 2:
        return ""
    return (
        f"method {run.method} trains a distillation token, which {name} does not have: "
        "set student.name to a deit_..._distilled"
    )


class DeiT(term.Term):
    """ce_weight CE of the class token's head + weight * `token_loss` of the other's."""

    ce_weight: float = 0.5
    weight: float = 0.5
    hard: bool = fields.field(
        True, "learn the class that the teacher answers; False: its probabilities"
    )
    temperature: float = fields.field(1.0, "hard=False", fields.above(0))

    title: ClassVar[str] = "DeiT (token)"
    about: ClassVar[str] = "for deit_..._distilled; published with label_smoothing=0.1"
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (*term.Term.rules, _two_heads)

    def hard_loss(self, signals: method.Signals) -> jax.Array:
        """See `Term`."""
        of_class, _ = signals.student.head_logits
        return signals.cross_entropy(of_class)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `token`."""
        _, of_token = signals.student.head_logits
        loss = token_loss(
            of_token,
            signals.teacher.logits,
            hard=self.hard,
            temperature=self.temperature,
        )
        return [{"token": loss}]


METHODS = {"deit": DeiT}
ORDER = 45  # in lists of methods
