"""Similarity-preserving distillation.

Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (arXiv
1907.09682), equations 1 to 4.
"""

import jax
import jax.numpy as jnp

from lakd_jax.distill import relation


def sp_loss(student_feature: jax.Array, teacher_feature: jax.Array) -> jax.Array:
    """Mean squared difference of the two matrices of similarities between examples.

    A matrix is F F^T, (B, B), of flattened features, each row divided by its L2 norm.
    Sizes and widths of the two features may differ.

    Args:
      student_feature: (B, ...), the last one in the paper.
      teacher_feature: (B, ...); it gets no gradient.

    Returns:
      Scalar float32, never negative.
    """
    student, teacher = relation.frozen(student_feature, teacher_feature)
    return jnp.mean((_similarities(student) - _similarities(teacher)) ** 2)


def _similarities(feature: jax.Array) -> jax.Array:
    rows = relation.flat(feature)
    return relation.unit(rows @ rows.T)
