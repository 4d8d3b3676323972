"""Distillation by singular value decomposition: how two stages' main directions lie.

Source: Lee et al., "Self-supervised Knowledge Distillation Using Singular Value
Decomposition" (ECCV 2018; arXiv 1807.06819), sections 3.1 to 3.3, in the form of the
public benchmark's code (RepDistiller).
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.distill.base import method, numerics, term
from lakd_jax.distill.base import rules as rules_lib

_MORE = 3  # vectors of the student beside k, among which the teacher's are sought
_LEAST = 1e-6  # of a gap between squared singular values, as a share of the largest


def kdsvd_loss(
    student_features: Sequence[jax.Array],
    teacher_features: Sequence[jax.Array],
    k: int,
) -> jax.Array:
    """Sum over neighbouring stages of squared differences of their relations.

    A stage's features, (H W, C) an example, have right singular vectors. The teacher's
    first k are taken, and of the student's first k + 3, for each of these, the one that
    is nearest in direction or against it, turned to its side; each is scaled by the
    share of the teacher's singular value. The relation of two stages is
    exp(-(a_i - b_j)^2 / 8) of all channels i of the one and j of the other; summed over
    these, and over the batch divided by its size.

    A vector's sign, which the decomposition leaves open, is that with a positive sum
    (our interpretation; the code has that of its library, which for features that are
    not negative is the same for all stages). Directions whose singular values are
    almost equal have no gradient towards each other, which would be infinite (the code
    leaves out losses that are not finite, but not such gradients).

    Args:
      student_features: (B, H, W, C) each, two or more.
      teacher_features: as many, (B, H', W', C) each of the same widths; they get no
        gradient.
      k: singular vectors; 1 in the public code.

    Returns:
      Scalar float32, never negative.

    Raises:
      ValueError: widths differ.
    """
    return sum(_losses(student_features, teacher_features, k), jnp.float32(0))


def _losses(
    student_features: Sequence[jax.Array],
    teacher_features: Sequence[jax.Array],
    k: int,
) -> list[jax.Array]:
    """`kdsvd_loss` of every two neighbours."""
    pairs = zip(student_features, teacher_features, strict=True)
    vectors = [_aligned(*numerics.frozen(*pair), k) for pair in pairs]
    found = []
    for (s_below, t_below), (s, t) in zip(vectors[:-1], vectors[1:], strict=True):
        apart = _relation(s_below, s) - _relation(t_below, t)
        found.append(jnp.sum(apart**2) / len(apart))
    return found


def _relation(below: jax.Array, above: jax.Array) -> jax.Array:
    """(B, C, k) and (B, C', k) -> (B, C', C, k)."""
    return jnp.exp(-((above[:, :, None] - below[:, None]) ** 2) / 8)


def _aligned(
    student: jax.Array, teacher: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The scaled vectors of one stage, (B, C, k) each."""
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"KDSVD compares features of the same width, not {student.shape[-1]} with "
            f"{teacher.shape[-1]}"
        )
    _, values, rows = jnp.linalg.svd(_matrix(teacher), full_matrices=False)
    t = rows[:, :k].swapaxes(1, 2)
    t = t * jnp.where(jnp.sum(t, 1, keepdims=True) < 0, -1.0, 1.0)
    s = right_vectors(_matrix(student), k + _MORE)
    cosines = jnp.einsum("bci,bcj->bij", s, t)
    nearest = jnp.argmax(jnp.abs(cosines), 1)
    chosen = jax.nn.one_hot(nearest, s.shape[-1], axis=1) * jnp.sign(cosines)
    s = jnp.einsum("bci,bij->bcj", s, jax.lax.stop_gradient(chosen))
    scale = numerics.unit(values[:, :k])[:, None]
    return s * scale, t * scale


def _matrix(features: jax.Array) -> jax.Array:
    """(B, H, W, C) as (B, H W, C)."""
    return features.reshape(len(features), -1, features.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def right_vectors(x: jax.Array, count: int) -> jax.Array:
    """The first right singular vectors of matrices, with a gradient that is finite.

    Args:
      x: (B, N, C) float32.
      count: how many; fewer come where min(N, C) is less.

    Returns:
      (B, C, count).
    """
    return jnp.linalg.svd(x, full_matrices=False)[2][:, :count].swapaxes(1, 2)


def _forwards(x: jax.Array, count: int) -> tuple[jax.Array, Any]:
    u, values, rows = jnp.linalg.svd(x, full_matrices=False)
    v = rows.swapaxes(1, 2)
    return v[..., :count], (u, values, v)


def _backwards(count: int, decomposition: Any, grad: jax.Array) -> tuple[jax.Array]:
    """Of dv_i = sum_j v_j v_j^T dG v_i / (l_i - l_j), G = x^T x, and outside all v_j.

    l are the squares of the singular values; outside of v they are 0.
    """
    u, values, v = decomposition
    u_own, v_own = u[..., :count], v[..., :count]
    least = _LEAST * values[:, :1] ** 2  # (B, 1)
    squares, own = values**2, values[:, :count]
    gaps = own[:, None] ** 2 - squares[..., None]  # (B, all, own)
    within = v.swapaxes(1, 2) @ grad
    mixed = _inverse(gaps, least[..., None]) * within
    outside = grad - v @ within
    towards = v @ mixed * own[:, None] + outside * own[:, None] * _inverse(
        own[:, None] ** 2, least[..., None]
    )
    dx = u_own @ towards.swapaxes(1, 2)
    return (dx + (u * values[:, None]) @ mixed @ v_own.swapaxes(1, 2),)


def _inverse(x: jax.Array, least: jax.Array) -> jax.Array:
    """1 / x, and 0 where |x| is not above `least`."""
    far = jnp.abs(x) > least
    return jnp.where(far, 1 / jnp.where(far, x, 1.0), 0.0)


right_vectors.defvjp(_forwards, _backwards)


class KDSVD(term.Term):
    """ce_weight CE + weight * `kdsvd_loss`.

    A relation belongs to the module of the later of its two stages, so that the first
    module has none; its gradient reaches the stage before, too, whatever
    `local.cut_scale`.
    """

    weight: float = 1.0
    k: int = fields.field(1, "singular vectors", fields.at_least(1))

    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        *term.Term.rules,
        rules_lib.equal_widths,
    )
    staged: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `kdsvd`, in every module but the first."""
        found = _losses(signals.student_joints, signals.teacher_joints, self.k)
        return [{}, *({"kdsvd": loss} for loss in found)]


METHODS = {"kdsvd": KDSVD}
ORDER = 200  # in lists of methods
