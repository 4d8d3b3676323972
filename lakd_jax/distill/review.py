"""Knowledge review: the hierarchical context loss.

Source: Chen et al., "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044),
section 3.4; levels and weights of the public code.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lakd_jax.distill import ndam, relation

_LEVELS = (4, 2, 1)  # sides of the pooled maps


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
        student, teacher = relation.frozen(*pair)
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
