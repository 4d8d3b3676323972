"""Adapters that bring a student's feature map to the shape of the teacher's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.distill import ndam


def match_size(u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P of LAKD's u = P(A(h)), v = P(z): the larger map pooled to the smaller.

    Adaptive average pooling, on each axis by itself, with PyTorch's cells also
    where one size does not divide the other (the rule of Attention Transfer).

    Args:
      u: (B, H, W, C).
      v: (B, H', W', C').

    Returns:
      Both at (min(H, H'), min(W, W')); float types are kept.
    """
    height, width = (min(u.shape[i], v.shape[i]) for i in (1, 2))
    pool = ndam.adaptive_pool
    return pool(u, height, width, jnp.mean), pool(v, height, width, jnp.mean)


def resize_like(u: jax.Array, v: jax.Array) -> jax.Array:
    """`u` at the height and width of `v`: averaged down or repeated up (nearest).

    For maps that are fed to the teacher's later stages, which were trained at
    the teacher's size.

    Args:
      u: (B, H, W, C).
      v: (B, H', W', C').

    Returns:
      (B, H', W', C).
    """
    height, width = v.shape[1:3]
    small, _ = match_size(u, v)
    return ndam.resize_nearest(small, height, width)


def batch_norm(*, train: bool, name: str, dtype: Any = None) -> nn.BatchNorm:
    """Makes a batch norm with PyTorch's constants, as the parts of methods have it."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        name=name,
    )


class Adapter(nn.Module):
    """A of LAKD: 1x1 convolution without bias, then batch norm.

    Owned by its local module, trained with it and dropped after training. The
    paper's adapters, if it has any, are not known to us: this is FitNet's
    regressor as the literature builds it.

    Attributes:
      features: channels of the teacher's map.
      dtype: of the maps; statistics are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, features) of `dtype`."""
        conv = nn.Conv(
            self.features, (1, 1), use_bias=False, dtype=self.dtype, name="conv"
        )
        x = conv(x.astype(self.dtype))
        return batch_norm(train=train, name="bn", dtype=self.dtype)(x)


def again(adapter: Adapter, x: jax.Array, *, train: bool) -> jax.Array:
    """A second pass through a bound `adapter` that leaves its statistics alone.

    Calling the adapter itself twice in a step would move its running statistics
    twice.

    Args:
      adapter: bound and already called once.
      x: (B, H, W, C).
      train: whether to normalise by the statistics of this batch.

    Returns:
      (B, H, W, features) of the adapter's type.
    """
    free = Adapter(adapter.features, adapter.dtype, parent=None)
    out, _ = free.apply(adapter.variables, x, train=train, mutable=["batch_stats"])
    return out
