"""Neuron selectivity transfer: match what positions each channel responds to.

Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
Transfer" (arXiv 1707.01219), equation 3 with the polynomial kernel (d = 2, c = 0).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lakd_jax.distill.base import adapter, method, numerics, term


def nst_loss(
    student_features: Sequence[jax.Array], teacher_features: Sequence[jax.Array]
) -> jax.Array:
    """Sum over stages of the squared maximum mean discrepancy between channels.

    A channel is its map divided by its L2 norm; the kernel of two is their squared
    product. Of two sizes the larger features are pooled to the smaller; widths may
    differ.

    Args:
      student_features: (B, H, W, C) each.
      teacher_features: as many, (B, H', W', C') each; they get no gradient.

    Returns:
      Scalar float32, not negative but for rounding.
    """
    total = jnp.float32(0)
    for pair in zip(student_features, teacher_features, strict=True):
        s, t = map(_channels, adapter.match_size(*numerics.frozen(*pair)))
        total += _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)
    return total


def _channels(features: jax.Array) -> jax.Array:
    """(B, C, H * W), unit vectors."""
    batch, height, width, channels = features.shape
    rows = features.reshape(batch, height * width, channels).swapaxes(1, 2)
    return numerics.unit(rows)


def _kernel(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.mean(jnp.einsum("bin,bjn->bij", a, b) ** 2)


class NST(term.Term):
    """ce_weight CE + weight * `nst_loss`, in each module its own stage's part.

    The paper's loss is on the last stage alone; the public code has it on all.
    """

    weight: float = 50.0

    staged: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `nst`, one per module."""
        pairs = zip(signals.student_joints, signals.teacher_joints, strict=True)
        return [{"nst": nst_loss([ours], [theirs])} for ours, theirs in pairs]


METHODS = {"nst": NST}
ORDER = 160  # in lists of methods
