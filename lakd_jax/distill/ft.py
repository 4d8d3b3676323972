"""Factor transfer: the loss between two factors.

Source: Kim et al., "Paraphrasing Complex Network" (arXiv 1802.04977), equation 4; the
paraphraser and the translator, which make the factors, are networks of their own.
"""

import jax
import jax.numpy as jnp

from lakd_jax.distill import adapter, relation, tap_attention


def factor_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean absolute difference of attention maps (p1 = 2, p2 = 1 of the public code).

    A map is the mean over channels of squares, its positions divided by their L2 norm.
    (The paper compares normalised factors themselves; the benchmark's code does this.)
    Of two sizes the larger one is pooled to the smaller.

    Args:
      student: (B, H, W, C), the translator's.
      teacher: (B, H', W', C'), the paraphraser's; it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    s, t = adapter.match_size(*relation.frozen(student, teacher))
    return jnp.mean(relation.magnitude(_factor(s) - _factor(t)))


def _factor(features: jax.Array) -> jax.Array:
    return relation.unit(relation.flat(tap_attention.activation_map(features)))
