"""Computes activation maps: where in the image a module responds."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def attention_maps(features: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns one map per feature: the sum over channels of |x|, scaled to [0, 1].

    The sum of absolute values is the map F_sum of activation-based attention
    transfer (Zagoruyko and Komodakis, ICLR 2017, section 3.1, p = 1). Each map
    is scaled by the minimum and maximum within its image; a constant map becomes 0.

    Args:
      features: arrays (B, h, w, C) of any float type, one per module.

    Returns:
      float32 arrays (B, h, w), in the order of `features`.
    """
    return [_unit_range(_absolute_sum(feature)) for feature in features]


def _absolute_sum(feature: jax.Array) -> jax.Array:
    # Cast first: a bfloat16 sum over hundreds of channels drops the small terms.
    return jnp.sum(jnp.abs(jnp.asarray(feature, jnp.float32)), axis=-1)


def _unit_range(maps: jax.Array) -> jax.Array:
    low = jnp.min(maps, axis=(1, 2), keepdims=True)
    span = jnp.max(maps, axis=(1, 2), keepdims=True) - low
    return (maps - low) / jnp.where(span > 0, span, 1.0)
