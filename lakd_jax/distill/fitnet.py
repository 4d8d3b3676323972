"""Hints: match the features of one stage through a regressor.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation
3; regressor and reduction of the public benchmark's code (RepDistiller).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import adapter, method, numerics, term
from lakd_jax.distill.base import rules as rules_lib


def hint_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference (the paper has half the sum).

    Args:
      student: (B, H, W, C), the regressor's.
      teacher: (B, H, W, C); it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    s, t = numerics.frozen(student, teacher)
    return jnp.mean((s - t) ** 2)


class Regressor(nn.Module):
    """1x1 convolution with bias, batch norm and perhaps a ReLU; float32.

    That of the public code where both networks have one size. It strides or widens
    its convolution where they have not; here the larger features are pooled before.

    Attributes:
      features: channels of the teacher's map.
      relu: whether the result is rectified.
    """

    features: int
    relu: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, features) float32."""
        x = nn.Conv(self.features, (1, 1), name="conv")(x.astype(jnp.float32))
        x = adapter.batch_norm(train=train, name="bn")(x)
        return nn.relu(x) if self.relu else x


def _hint(options: Any, run: rules_lib.Run) -> str:
    modules = len(run.modules)
    if options.hint_layer <= modules:
        return ""
    return (
        f"{run.method}.hint_layer is {options.hint_layer}, but the student has "
        f"{modules} modules: choose one of them"
    )


class FitNet(term.Term):
    """ce_weight CE + weight * `hint_loss` of one stage, through a `Regressor`.

    The paper trains up to the hint first and with the labels afterwards; the public
    code, and this, do both at once.
    """

    weight: float = 100.0
    hint_layer: int = fields.field(
        2, "number of the stage (the module) that is compared", fields.at_least(1)
    )

    title: ClassVar[str] = "FitNet"
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (*term.Term.rules, _hint)
    staged: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `fitnet`, in the module of the hint only."""
        k = self.hint_layer - 1
        pair = signals.student_joints[k], signals.teacher_joints[k]
        ours, theirs = adapter.match_size(*numerics.frozen(*pair))
        name = f"module{self.hint_layer}"
        regress = Regressor(theirs.shape[-1], relu=True, name=name)
        terms: list[Any] = [{} for _ in signals.student_joints]
        terms[k]["fitnet"] = hint_loss(regress(ours, train=train), theirs)
        return terms


METHODS = {"fitnet": FitNet}
ORDER = 190  # in lists of methods
