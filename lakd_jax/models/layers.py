"""Layers with PyTorch's padding, initialisation and batch-norm constants."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Uniform on +-1/sqrt(fan_in): the variance is a third of the squared bound.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(features: int, kernel: int, stride: int, *, dtype: Any, name: str) -> nn.Conv:
    """A square convolution without bias, padded evenly by (kernel - 1) / 2.

    The padding is explicit because "SAME" pads strided convolutions on the far side
    only, which is not what PyTorch networks were trained with. Initialised as He et
    al. 2015, "Delving Deep into Rectifiers", with the fan-out.
    """
    pad = (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        dtype=dtype,
        kernel_init=he_normal_fan_out,
        name=name,
    )


def batch_norm(*, train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    """Batch normalisation over the global batch; statistics in float32.

    Epsilon 1e-5 and decay 0.9 are PyTorch's 1e-5 and momentum 0.1. Running variances
    average the biased batch variance (PyTorch: the unbiased one; they differ by a
    factor n / (n - 1) with n = batch * height * width). The variance is taken in two
    passes: E[x^2] - E[x]^2 loses six digits where a channel's mean is a thousand
    times its deviation, and was no faster on CPU.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        use_fast_variance=False,
        name=name,
    )


class Head(nn.Module):
    """Global average pool and linear classifier, initialised as torch's Linear.

    Attributes:
        num_classes: width of the logits.
        dtype: what the classifier computes in.
    """

    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Map (B, H, W, C) to logits (B, classes) and pooled (B, C)."""
        pooled = jnp.mean(x, (1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        bound = 1 / math.sqrt(pooled.shape[-1])
        dense = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            kernel_init=uniform_fan_in,
            bias_init=lambda key, shape, dtype: jax.random.uniform(
                key, shape, dtype, -bound, bound
            ),
            name="dense",
        )
        return dense(pooled), pooled
