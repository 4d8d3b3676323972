"""Overhaul of feature distillation: the partial L2 loss behind a margin ReLU.

Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation" (arXiv
1904.01866), equations 2 and 3; the public code's reduction.
"""

import jax
import jax.numpy as jnp

from lakd_jax.distill import relation


def margin_loss(student: jax.Array, teacher: jax.Array, margin: jax.Array) -> jax.Array:
    """Squared errors where they count: mean over the batch, sum over the rest.

    The teacher's response is max(teacher, margin). A position counts where that is
    above 0, or where the student is above it.

    Args:
      student: (B, H, W, C), through its connector.
      teacher: (B, H, W, C) before the last ReLU; it gets no gradient.
      margin: the negative margin of each channel, (C,) or anything that broadcasts.

    Returns:
      Scalar float32, never negative.
    """
    source, target = relation.frozen(student, teacher)
    target = jnp.maximum(target, jnp.broadcast_to(margin, target.shape))
    counts = (source > target) | (target > 0)
    errors = jnp.where(counts, (source - target) ** 2, 0.0)
    return jnp.sum(errors) / len(source)
