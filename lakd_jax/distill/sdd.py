"""Scale decoupled distillation: a loss on logits also for the parts of an image.

Source: Wei, Luo, Luo, "Scale Decoupled Distillation" (arXiv 2403.13512) and the
authors' public code. Deviations from the latter:

* A part's logits are the mean of the logits at its positions, which for a head of
  pooling and a linear layer are the logits of its mean feature, and for heads that
  normalise before they pool stay right, too.
* Each scale is pooled from the map itself; there all of them from 4x4 cells of it,
  which is the same where 4 divides the map's sides.
* With base=nkd the label is left out of the others, as NKD's own code does; the copy of
  NKD beside the public code of this method leaves it in.
* NaN is not replaced by 0: logarithms of probabilities are computed as such.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill import dkd, kd, ndam, nkd
from lakd_jax.distill.base import method, numerics, term

BASES = ("kd", "dkd", "nkd")


def cells(logits: jax.Array, scales: Sequence[int]) -> jax.Array:
    """Means of a map over the parts of all scales; scale k has k x k.

    Args:
      logits: (B, H, W, classes).
      scales: each at least 1.

    Returns:
      (B, parts, classes).
    """
    pooled = [ndam.adaptive_pool(logits, k, k, jnp.mean) for k in scales]
    rows = [x.reshape(len(x), -1, x.shape[-1]) for x in pooled]
    return jnp.concatenate(rows, 1)


def sdd_loss(
    student_cells: jax.Array,
    teacher_cells: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    complementary: float,
    base: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Mean of the base loss over all parts of all examples, weighed.

    A part is consistent, and has weight 1, where the teacher is right (or wrong) both
    about it and about the whole image; else it is complementary. The teacher gets no
    gradient.

    Args:
      student_cells: (B, parts, classes), any floating type.
      teacher_cells: (B, parts, classes), any floating type.
      teacher_logits: (B, classes), of whole images.
      labels: (B,) integers.
      complementary: weight of such parts; 2 in the public code.
      base: (student logits, teacher logits, labels) of N examples -> their mean loss.

    Returns:
      Scalar float32.
    """
    right = jnp.argmax(teacher_logits, -1) == labels
    right_here = jnp.argmax(teacher_cells, -1) == labels[:, None]
    weights = jnp.where(right_here == right[:, None], 1.0, complementary)

    def one(student: jax.Array, teacher: jax.Array, label: jax.Array) -> jax.Array:
        return base(student[None], teacher[None], label[None])

    each = jax.vmap(jax.vmap(one, (0, 0, None)))
    return jnp.mean(weights * each(student_cells, teacher_cells, labels))


class SDD(term.LogitTerm):
    """ce_weight CE + weight * `sdd_loss` on top of KD, DKD or NKD."""

    ce_weight: float = 0.1
    weight: float = 0.9
    base: str = fields.field(
        "kd", "kd | dkd | nkd: the loss of each part", fields.one_of(BASES)
    )
    scales: tuple[int, ...] = fields.field(
        (1, 2),
        "parts by side; (1, 2, 4) for networks of two families",
        fields.some(fields.whole(1)),
    )
    complementary: float = fields.field(
        2.0,
        "weight of parts about which the teacher changes its mind",
        fields.at_least(0),
    )
    temperature: float = fields.field(4.0, check=fields.above(0))
    alpha: float = fields.field(
        1.0, "base=dkd: of the label against all other classes", fields.at_least(0)
    )
    beta: float = fields.field(
        8.0,
        "base=dkd: of the others; 2 and 6 in some of the reference's pairs",
        fields.at_least(0),
    )
    gamma: float = fields.field(
        1.5, "base=nkd: of the classes other than the label", fields.at_least(0)
    )
    standardise: bool = fields.field(False, "z-scores of the logits of each part")

    about: ClassVar[str] = "base=dkd: ce_weight=1, weight=1, warmup_epochs=20"
    needs_heads: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("logits", "joints", "head")

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `sdd`."""
        ours = numerics.logit_map(signals.student_head, signals.student_joints[-1])
        theirs = numerics.logit_map(signals.teacher_head, signals.teacher_joints[-1])
        ours, theirs = cells(ours, self.scales), cells(theirs, self.scales)
        if self.standardise:
            ours, theirs = kd.standardised(ours), kd.standardised(theirs)
        whole, labels = signals.teacher.logits, signals.labels
        options = (self.complementary, self._base())
        return [{"sdd": sdd_loss(ours, theirs, whole, labels, *options)}]

    def _base(self) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
        if self.base == "kd":
            return lambda student, teacher, _: kd.kd_loss(
                student, teacher, self.temperature
            )
        if self.base == "dkd":
            weights = {"alpha": self.alpha, "beta": self.beta}
            return functools.partial(
                dkd.dkd_loss, **weights, temperature=self.temperature
            )
        return functools.partial(
            nkd.nkd_loss, gamma=self.gamma, temperature=self.temperature
        )


METHODS = {"sdd": SDD}
ORDER = 130  # in lists of methods
