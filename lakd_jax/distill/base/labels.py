"""Cross-entropies with labels: hard, smoothed, and mixed."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean over the batch of -log softmax(logits)[label], scalar float32 >= 0.

    Args:
      logits: (B, classes), any floating type.
      labels: (B,) integers.
      weights: (B,) float32 of a weighted mean, as of PyTorch's `weight` per class.
    """
    logits = logits.astype(jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if weights is None:
        return jnp.mean(losses)
    return jnp.sum(weights * losses) / jnp.sum(weights)


def smoothed_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: float,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy with (1 - smoothing) of the label and the rest shared by all.

    Szegedy et al., "Rethinking the Inception Architecture" (arXiv 1512.00567), section
    7; the label has its share of the rest, too. 0 is `cross_entropy`.

    Args:
      logits: (B, classes), any floating type.
      labels: (B,) integers.
      smoothing: in [0, 1).
      weights: see `cross_entropy`; only without smoothing.

    Returns:
      Scalar float32, never negative.
    """
    hard = cross_entropy(logits, labels, weights)
    if not smoothing:
        return hard
    spread = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)))
    return (1 - smoothing) * hard + smoothing * spread


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of -sum of target * log softmax(logits), scalar float32.

    Args:
      logits: (B, classes), any floating type.
      targets: (B, classes) float32, the probabilities of each example's classes.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.sum(targets * log_p, -1))
