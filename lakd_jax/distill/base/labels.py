"""Cross-entropies with labels: hard, smoothed, and mixed."""

import jax
import jax.numpy as jnp
import optax

from lakd_jax.distill.base import numerics


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """Mean over the batch of -log softmax(logits)[label], scalar float32 >= 0.

    Args:
      logits: (B, classes), any floating type.
      labels: (B,) integers.
      weights: (B,) float32 of a weighted mean, as of PyTorch's `weight` per class.
      where: (B,) bool, the examples that count; None for all.
    """
    logits = logits.astype(jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if weights is None:
        return jnp.mean(losses, where=where)
    total = jnp.sum(weights * losses, where=where)
    return total / jnp.sum(weights, where=where)


def smoothed_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: float,
    weights: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy with (1 - smoothing) of the label and the rest shared by all.

    Szegedy et al., "Rethinking the Inception Architecture" (arXiv 1512.00567), section
    7; the label has its share of the rest, too. 0 is `cross_entropy`.

    Args:
      logits: (B, classes), any floating type.
      labels: (B,) integers.
      smoothing: in [0, 1).
      weights: see `cross_entropy`; only without smoothing.
      where: see `cross_entropy`.

    Returns:
      Scalar float32, never negative.
    """
    hard = cross_entropy(logits, labels, weights, where)
    if not smoothing:
        return hard
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    spread = -numerics.batch_mean(log_p, where)
    return (1 - smoothing) * hard + smoothing * spread


def soft_cross_entropy(
    logits: jax.Array, targets: jax.Array, where: jax.Array | None = None
) -> jax.Array:
    """Mean over the batch of -sum of target * log softmax(logits), scalar float32.

    Args:
      logits: (B, classes), any floating type.
      targets: (B, classes) float32, the probabilities of each example's classes.
      where: see `cross_entropy`.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.sum(targets * log_p, -1), where=where)
