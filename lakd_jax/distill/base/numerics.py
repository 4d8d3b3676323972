"""What several of the losses have in common: float32, |x|, norms, divergence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_EPS = 1e-12  # the shortest vector that has a direction


def frozen(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as float32; no gradient reaches the second."""
    teacher = jax.lax.stop_gradient(teacher)
    return student.astype(jnp.float32), teacher.astype(jnp.float32)


def magnitude(x: jax.Array) -> jax.Array:
    """|x| whose gradient at 0 is 0, as PyTorch has it (JAX has 1)."""
    return jnp.where(x == 0, 0.0, jnp.abs(x))


def unit(x: jax.Array) -> jax.Array:
    """x / ||x||_2 over the last axis; zeros stay zero, with zero gradient.

    Args:
      x: (..., N) float32.
    """
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    alive = squares > _EPS**2
    # The inner where keeps the gradient of zeros finite.
    scale = jax.lax.rsqrt(jnp.where(alive, squares, 1.0))
    return x * jnp.where(alive, scale, 0.0)


def divergence(log_teacher: jax.Array, log_student: jax.Array) -> jax.Array:
    """KL(teacher || student) of log-probabilities (..., N), (...,)."""
    return jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), -1)


def batch_mean(x: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Returns the mean of (B, ...), over the examples `where` (B,) or over all."""
    if where is None:
        return jnp.mean(x)
    return jnp.mean(jnp.mean(x, tuple(range(1, x.ndim))), where=where)


def logit_map(head: Callable[[jax.Array], jax.Array], features: jax.Array) -> jax.Array:
    """The logits of each position alone; where a head is linear, their mean is its own.

    Args:
      head: activations (N, 1, 1, C) -> logits (N, classes).
      features: (B, H, W, C).

    Returns:
      (B, H, W, classes) float32.
    """
    positions = features.reshape(-1, 1, 1, features.shape[-1])
    logits = head(positions).astype(jnp.float32)
    return logits.reshape(*features.shape[:3], -1)


def flat(x: jax.Array) -> jax.Array:
    """(B, ...) as (B, N)."""
    return x.reshape(len(x), -1)


def not_negative(divergence: jax.Array) -> jax.Array:
    """Lifts what rounding made negative (about -1e-8, of near-equal logits) to 0.

    The gradient, which is accurate there, is kept.
    """
    return divergence + jax.lax.stop_gradient(jnp.maximum(-divergence, 0.0))
