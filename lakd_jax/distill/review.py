"""Knowledge review: fused stages of the student, the hierarchical context loss.

Source: Chen et al., "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044),
section 3.4; levels, weights and widths of the public code.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import ndam
from lakd_jax.distill.base import method, numerics, term
from lakd_jax.models import layers

_LEVELS = (4, 2, 1)  # sides of the pooled maps
_WIDEST = 512  # of what is handed on between stages
# He et al.'s uniform initialisation for what no ReLU follows.
_STYLE = layers.Style(
    kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
)


def hcl_loss(
    student_features: Sequence[jax.Array], teacher_features: Sequence[jax.Array]
) -> jax.Array:
    """Sum over stages of the mean of mean squared errors at several sizes.

    The map itself has weight 1, and each smaller level (average-pooled to 4x4, 2x2
    and 1x1, as far as it is smaller than the map) half of the one before.

    Args:
      student_features: (B, H, W, C) each, after the fusion of stages.
      teacher_features: as many, of the same shapes; they get no gradient.

    Returns:
      Scalar float32, never negative.
    """
    total = jnp.float32(0)
    for pair in zip(student_features, teacher_features, strict=True):
        student, teacher = numerics.frozen(*pair)
        value, weights, weight = jnp.mean((student - teacher) ** 2), 1.0, 1.0
        for side in _LEVELS:
            if side >= student.shape[1]:
                continue
            s, t = (
                ndam.adaptive_pool(x, side, side, jnp.mean) for x in (student, teacher)
            )
            weight /= 2
            value, weights = value + weight * jnp.mean((s - t) ** 2), weights + weight
        total += value / weights
    return total


class Fusion(nn.Module):
    """One stage fused with all later ones by attention (ABF); float32.

    Attributes:
      middle: channels of what is fused and handed on.
      features: channels of the teacher's map.
    """

    middle: int
    features: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        later: jax.Array | None,
        size: Sequence[int],
        *,
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Of the student's map and of what the stage after it handed on.

        Args:
          x: (B, H, W, C).
          later: (B, H', W', middle), or None: nothing comes after it.
          size: of the teacher's map.
          train: whether to normalise by the statistics of this batch.

        Returns:
          (B, *size, features) for the loss and (B, *size, middle) to hand on.
        """
        convolve = functools.partial(layers.conv_norm, style=_STYLE, train=train)
        x = convolve(x.astype(jnp.float32), self.middle, 1, 1, name="conv1")
        if later is not None:
            later = ndam.resize_nearest(later, *x.shape[1:3])
            attend = nn.Conv(2, (1, 1), kernel_init=layers.uniform_fan_in, name="att")
            shares = nn.sigmoid(attend(jnp.concatenate([x, later], -1)))
            x = x * shares[..., :1] + later * shares[..., 1:]
        x = ndam.resize_nearest(x, *size)
        return convolve(x, self.features, 3, 1, name="conv2"), x


class Review(term.Term):
    """ce_weight CE + weight * `hcl_loss` of the fused stages and pooled features.

    Each module has the loss of its own stage, the last also that of the pooled
    features. But a stage is fused with what later ones hand on, so that its loss
    trains these, too: with `local.cut_scale` 0 no gradient crosses a cut downwards,
    while later stages still learn from the losses of earlier ones.

    As in the public code the stem takes no part, the student's maps are repeated or
    thinned (nearest) to the teacher's sizes, and the teacher's are taken before the
    ReLU. There, too, pooled features are a last stage of 1x1.
    """

    weight: float = 1.0
    warmup_epochs: float = 20.0
    student_preact: bool = fields.field(
        False, "the student's maps before the ReLU; True on ImageNet"
    )

    title: ClassVar[str] = "ReviewKD"
    about: ClassVar[str] = "the weight is 5 for resnet32x4 -> resnet8x4"
    pairs: ClassVar[method.Pairs] = {("resnet32x4", "resnet8x4"): {"weight": 5.0}}
    staged: ClassVar[bool] = True
    needs_preacts: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("preacts", "pooled")

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `review`, one per module."""
        joints = signals.student_joints
        stages = signals.student_preacts if self.student_preact else joints
        ours = (*stages, as_map(signals.student.pooled))
        theirs = (*signals.teacher_preacts, as_map(signals.teacher.pooled))
        middle = min(_WIDEST, ours[-1].shape[-1])

        def fusion(name: str, features: int) -> Fusion:
            return Fusion(middle, features, name=name)

        fused = from_the_last(fusion, ours, theirs, train=train)
        values = [hcl_loss([x], [z]) for x, z in zip(fused, theirs, strict=True)]
        return [{"review": value} for value in by_module(values)]


def from_the_last(
    fusion: Callable[[str, int], Callable[..., tuple[jax.Array, jax.Array]]],
    ours: Sequence[jax.Array],
    theirs: Sequence[jax.Array],
    *,
    train: bool,
) -> list[jax.Array]:
    """The student's maps, each fused with what the one behind it hands on.

    Args:
      fusion: (name, channels of the teacher's map) -> what is called as `Fusion` is.
      ours: (B, H, W, C) of every stage, then of the pooled features, see `as_map`.
      theirs: as many of the teacher, whose sizes and widths the result has.
      train: whether to normalise by the statistics of this batch.
    """
    names = [*(f"module{k}" for k in range(1, len(ours))), "head"]
    later, fused = None, []
    for name, mine, target in reversed(list(zip(names, ours, theirs, strict=True))):
        fuse = fusion(name, target.shape[-1])
        x, later = fuse(mine, later, target.shape[1:3], train=train)
        fused.insert(0, x)
    return fused


def by_module(values: Sequence[jax.Array]) -> list[jax.Array]:
    """One per stage and one of the pooled features -> one per module."""
    *stages, last, pooled = values
    return [*stages, last + pooled]


def as_map(pooled: jax.Array) -> jax.Array:
    """(B, C) as (B, 1, 1, C)."""
    return pooled[:, None, None]


METHODS = {"review": Review}
ORDER = 260  # in lists of methods
