"""Flow of solution procedure: match how features of two stages go together.

Source: Yim et al., "A Gift from Knowledge Distillation" (CVPR 2017), equations 1, 2.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax.distill.base import adapter, initial, method, numerics
from lakd_jax.distill.base import rules as rules_lib


def fsp_loss(
    student_features: Sequence[jax.Array], teacher_features: Sequence[jax.Array]
) -> jax.Array:
    """Sum over neighbouring stages of the mean squared difference of FSP matrices.

    A matrix is the mean over positions of the products of a channel of one stage with
    a channel of the next, of which the larger map is pooled to the smaller.

    Args:
      student_features: (B, H, W, C) each, two or more.
      teacher_features: as many, of the same widths; they get no gradient.

    Returns:
      Scalar float32, never negative.

    Raises:
      ValueError: widths differ.
    """
    pairs = [
        numerics.frozen(*pair)
        for pair in zip(student_features, teacher_features, strict=True)
    ]
    for student, teacher in pairs:
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"FSP compares features of the same width, not {student.shape[-1]} "
                f"with {teacher.shape[-1]}: project one of them first"
            )
    students, teachers = zip(*pairs, strict=True)
    both = zip(_flows(students), _flows(teachers), strict=True)
    return sum((jnp.mean((s - t) ** 2) for s, t in both), jnp.float32(0))


def _flows(features: Sequence[jax.Array]) -> list[jax.Array]:
    """(B, C, C') of every two neighbours."""
    flows = []
    for pair in zip(features[:-1], features[1:], strict=True):
        below, above = adapter.match_size(*pair)
        positions = below.shape[1] * below.shape[2]
        flows.append(jnp.einsum("bhwc,bhwd->bcd", below, above) / positions)
    return flows


class FSP(initial.Initial):
    """First weight * `fsp_loss` alone, then ce_weight CE alone; see `initial`.

    A matrix belongs to the module of the later of its two stages, so that the first
    module has none; its gradient reaches the stage before, too, whatever
    `local.cut_scale`. Public code has one matrix more, of the stem and the first stage.
    """

    weight: float = 50.0

    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        *initial.Initial.rules,
        rules_lib.equal_widths,
    )
    staged: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `fsp`, in every module but the first."""
        ours, theirs = signals.student_joints, signals.teacher_joints
        pairs = [slice(k - 1, k + 1) for k in range(1, len(ours))]
        return [{}, *({"fsp": fsp_loss(ours[p], theirs[p])} for p in pairs)]


METHODS = {"fsp": FSP}
ORDER = 220  # in lists of methods
