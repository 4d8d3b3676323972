"""Activation boundaries: which side of zero each response is on.

Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed
by Hidden Neurons" (arXiv 1811.03233), equation 5 (the alternative loss); weights of the
stages, connectors and reduction of the public code.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill import fitnet
from lakd_jax.distill.base import adapter, initial, method, numerics


def boundary_loss(student: jax.Array, teacher: jax.Array, margin: float) -> jax.Array:
    """How far responses are from the margin on the teacher's side of zero, squared.

    Mean over the batch, sum over the rest.

    Args:
      student: (B, H, W, C) before the ReLU, through a connector.
      teacher: (B, H, W, C) before the ReLU; it gets no gradient.
      margin: distance from zero at which a response costs nothing; 1 in the paper.

    Returns:
      Scalar float32, never negative; 0 where every response is beyond the margin.
    """
    s, t = numerics.frozen(student, teacher)
    short = jnp.where(t > 0, margin - s, margin + s)
    return jnp.sum(jnp.maximum(short, 0.0) ** 2) / len(s)


class AB(initial.Initial):
    """First weight * `boundary_loss` alone, then ce_weight CE alone; see `initial`.

    Each module has its own stage's part, half as much as the next. Features of two
    shapes are compared through a `fitnet.Regressor` without ReLU, the larger pooled
    to the smaller before.
    """

    weight: float = 0.003
    margin: float = fields.field(
        1.0, "distance from zero at which a response costs nothing", fields.above(0)
    )
    init_epochs: float = fields.field(30.0)

    staged: ClassVar[bool] = True
    needs_preacts: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("preacts",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `ab`, one per module."""
        terms: list[Any] = []
        count = len(signals.student_preacts)
        pairs = zip(signals.student_preacts, signals.teacher_preacts, strict=True)
        for k, pair in enumerate(pairs, 1):
            ours, theirs = adapter.match_size(*numerics.frozen(*pair))
            if pair[0].shape != pair[1].shape:
                name = f"module{k}"
                connect = fitnet.Regressor(theirs.shape[-1], relu=False, name=name)
                ours = connect(ours, train=train)
            share = 2.0 ** (k - count)
            terms.append({"ab": share * boundary_loss(ours, theirs, self.margin)})
        return terms


METHODS = {"ab": AB}
ORDER = 210  # in lists of methods
