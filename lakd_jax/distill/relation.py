"""What several of the feature losses have in common: float32, norms, distances."""

import jax
import jax.numpy as jnp


def frozen(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as float32; no gradient reaches the second."""
    teacher = jax.lax.stop_gradient(teacher)
    return student.astype(jnp.float32), teacher.astype(jnp.float32)


def magnitude(x: jax.Array) -> jax.Array:
    """|x| whose gradient at 0 is 0, as PyTorch has it (JAX has 1)."""
    return jnp.where(x == 0, 0.0, jnp.abs(x))


def normalised(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Divided by the L2 norm over the last axis, or by `eps` if that is more.

    The gradient at a vector of zeros is that of a division by `eps`.
    """
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    # Two wheres: the root's gradient at 0 is infinite, and times 0 not a number.
    safe = jnp.where(squared > eps**2, squared, 1.0)
    return x / jnp.where(squared > eps**2, jnp.sqrt(safe), eps)


def flat(x: jax.Array) -> jax.Array:
    """(B, ...) as (B, N)."""
    return x.reshape(len(x), -1)


def smooth_l1(difference: jax.Array) -> jax.Array:
    """Mean Huber loss with its corner at 1, of PyTorch's `smooth_l1_loss`."""
    size = magnitude(difference)
    return jnp.mean(jnp.where(size < 1, 0.5 * difference**2, size - 0.5))
