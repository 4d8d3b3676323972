"""Depthwise convolutions in training on CPU, where XLA's own take ten times as long.

A sum of shifted products gives the same up to rounding; XLA fuses it into one loop. It
is for training only, where the time is spent: what is exported keeps the convolution.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

LEAST_SIDE = 5  # of the kernels for which it pays: smaller ones gain little


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> jax.Array:
    """Computes what `jax.lax.conv_general_dilated` does, for Linen's `Conv`.

    Args:
        lhs: (B, H, W, C).
        rhs: the kernel (k, k, 1, C).
        window_strides: (1, 1).
        padding: ((p, p), (p, p)) with p = (k - 1) / 2.
        **options: of a convolution with one group per channel.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: it is another kind of convolution.
    """
    side, pad = rhs.shape[0], (rhs.shape[0] - 1) // 2
    groups = options.get("feature_group_count")
    square = rhs.shape[:3] == (side, side, 1) and groups == lhs.shape[-1]
    if (
        not square
        or set(window_strides) != {1}
        or set(map(tuple, padding)) != {(pad, pad)}
    ):
        raise ValueError("a depthwise convolution of stride 1, padded evenly, is meant")
    return _convolve(lhs, rhs)


@jax.custom_vjp
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _shifted_products(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _shifted_products(x, kernel), (x, kernel)


def _backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # The kernel's gradient of XLA's own convolution is the faster one.
    _, of_kernel = jax.vjp(lambda kernel: _plain(x, kernel), kernel)
    return _shifted_products(grad, kernel[::-1, ::-1]), *of_kernel(grad)


_convolve.defvjp(_forward, _backward)


def _shifted_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    side, (_, height, width, _) = kernel.shape[0], x.shape
    pad = (side - 1) // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    total = jnp.zeros_like(x)
    for i in range(side):
        for j in range(side):
            weight = jnp.expand_dims(kernel[i, j, 0], (0, 1, 2))
            total += padded[:, i : i + height, j : j + width] * weight
    return total


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    pad = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
