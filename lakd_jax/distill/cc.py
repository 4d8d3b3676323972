"""Correlation congruence, in the form of the public benchmark's code.

Source: Peng et al., "Correlation Congruence for Knowledge Distillation" (arXiv
1904.01802). The benchmark (RepDistiller) does not compute the paper's kernels: it
multiplies the differences of neighbours in the batch, and so do we.
"""

import jax
import jax.numpy as jnp

from lakd_jax.distill import relation


def cc_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over neighbours i, i + 1 of sum(|s_i - t_i| * |s_i+1 - t_i+1|).

    Args:
      student: (B, N) embeddings, B at least 2.
      teacher: (B, N); it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    s, t = relation.frozen(student, teacher)
    apart = relation.magnitude(s - t)
    return jnp.mean(jnp.sum(apart[:-1] * apart[1:], -1))
