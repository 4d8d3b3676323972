"""Class attention transfer: the maps that each class is recognised by, compared.

Source: Guo et al., "Class Attention Transfer Based Knowledge Distillation" (arXiv
2304.12777); binarisation, pooling and reduction of the public code.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill import ndam
from lakd_jax.distill.base import method, numerics, term


def cam_loss(
    student_cams: jax.Array,
    teacher_cams: jax.Array,
    resolution: int,
    *,
    normalise: bool,
    binarise: bool,
) -> jax.Array:
    """Mean squared difference of class activation maps, pooled to one size.

    Args:
      student_cams: (B, H, W, classes).
      teacher_cams: (B, H', W', classes); they get no gradient.
      resolution: side of the pooled maps.
      normalise: the pooled map of each class is divided by its L2 norm.
      binarise: the teacher's map is first made 1 where it is above the mean of its
        magnitude, and 0 elsewhere.

    Returns:
      Scalar float32, never negative.
    """
    student, teacher = numerics.frozen(student_cams, teacher_cams)
    if binarise:
        threshold = jnp.mean(jnp.abs(teacher), (1, 2), keepdims=True)
        teacher = (teacher > threshold).astype(jnp.float32)
    ours, theirs = (_by_class(x, resolution) for x in (student, teacher))
    if normalise:
        ours, theirs = numerics.unit(ours), numerics.unit(theirs)
    return jnp.mean((ours - theirs) ** 2)


def _by_class(cams: jax.Array, side: int) -> jax.Array:
    """(B, H, W, classes) as (B, classes, side * side)."""
    pooled = ndam.adaptive_pool(cams, side, side, jnp.mean)
    return jnp.moveaxis(pooled.reshape(len(cams), side * side, -1), 1, 2)


class CATKD(term.Term):
    """ce_weight CE + weight * `cam_loss` of the last stage.

    The public code gives both networks classifiers without biases, the teacher by
    dropping its own. Here they are those of the networks as they are, and the maps
    have the biases in them, so that their mean over positions is the logits.
    """

    weight: float = 0.7
    resolution: int = fields.field(
        2, "side of the class activation maps that are compared", fields.at_least(1)
    )
    normalise: bool = fields.field(False, "the map of each class has L2 norm 1")
    binarise: bool = fields.field(
        False, "the teacher's map is 1 above its mean magnitude, else 0"
    )

    title: ClassVar[str] = "CAT-KD"
    about: ClassVar[str] = (
        "Of pairs 56-20; 1.8 for 110-32, 15 for 32x4-8x4, 12 for WRN, 4.5 for VGG. "
        "To other families normalise=True and weight=40 or more, with resolution=4 "
        "to ShuffleNets."
    )
    needs_heads: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints", "head")

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `cam`."""
        student = numerics.logit_map(signals.student_head, signals.student_joints[-1])
        teacher = numerics.logit_map(signals.teacher_head, signals.teacher_joints[-1])
        cam = cam_loss(
            student,
            teacher,
            self.resolution,
            normalise=self.normalise,
            binarise=self.binarise,
        )
        return [{"cam": cam}]


METHODS = {"catkd": CATKD}
ORDER = 270  # in lists of methods
