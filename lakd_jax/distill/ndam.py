"""NDAM, the non-directional activation mapping of LAKD: the teacher's mask.

W = a * avgpool(F_sum(T)) + b * maxpool(F_sum(T)), where F_sum adds a feature
map over its channels (LAKD, arXiv 2408.11478; the formula is known from
summaries of the paper). Pooling window, normalisation and the exact F_sum are
not known: each is an argument here and its default is **our interpretation**. F_sum is
the notation of Attention Transfer (Zagoruyko and Komodakis, arXiv 1612.03928),
which is why absolute values are the default. Everything is float32, NHWC.
"""

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill.base import numerics
from lakd_jax.models import pooling

F_SUMS = ("abs", "signed", "square")
NORMALISATIONS = ("mean", "l2", "max", "sigmoid", "none")

adaptive_pool, resize_nearest = pooling.adaptive_pool, pooling.resize_nearest

_EPS = 1e-8  # only an all-zero map feels it


def attention_map(features: jax.Array, kind: str) -> jax.Array:
    """S = F_sum(features), the sum over channels (ambiguity Q5).

    Args:
      features: (B, H, W, C).
      kind: `abs` sum |x| (default reading); `signed` sum x; `square` sum x^2.

    Returns:
      (B, H, W, 1) float32; never negative unless `signed`.
    """
    fields.check("f_sum", kind, F_SUMS)
    x = features.astype(jnp.float32)
    if kind == "abs":
        x = numerics.magnitude(x)
    elif kind == "square":
        x = jnp.square(x)
    return jnp.sum(x, axis=-1, keepdims=True)


def pooled_map(s: jax.Array, a: float, b: float, window: int, stride: int) -> jax.Array:
    """W = a * avgpool(S) + b * maxpool(S), as large as S (ambiguity Q4).

    Padding is SAME: the average counts only real pixels and the maximum pads
    with -inf, so a constant S gives the constant (a + b) S up to the borders.

    Args:
      s: (B, H, W, 1) or any (B, H, W, C).
      a: factor of the average.
      b: factor of the maximum.
      window: side of the pooling window. 0 stands for `stride` x `stride` equal
        cells over the whole map: (0, 1) is global pooling, (0, 4) a 4 x 4 grid.
      stride: 1 keeps the size; above 1 the pooled map is enlarged again by
        repeating its values (nearest), the coarse readings.

    Returns:
      (B, H, W, C) float32.
    """
    s = s.astype(jnp.float32)
    height, width = s.shape[1:3]
    if window == 0:
        rows, columns = min(stride, height), min(stride, width)
        average = adaptive_pool(s, rows, columns, jnp.mean)
        maximum = adaptive_pool(s, rows, columns, jnp.max)
        return resize_nearest(a * average + b * maximum, height, width)
    where = {"window_shape": (window, window), "strides": (stride, stride)}
    average = nn.avg_pool(s, **where, padding="SAME", count_include_pad=False)
    maximum = nn.max_pool(s, **where, padding="SAME")
    coarse = a * average + b * maximum
    if stride == 1:
        return coarse
    pattern = "b h w c -> b (h rows) (w columns) c"
    repeated = einops.repeat(coarse, pattern, rows=stride, columns=stride)
    return repeated[:, :height, :width]


def normalise(w: jax.Array, kind: str) -> jax.Array:
    """What: W brought to a common scale, image by image (ambiguity Q6).

    Args:
      w: (B, H, W, 1).
      kind: `mean` W / (mean_HW |W| + eps), so that L_att has L_lf's scale for
        every teacher and stage (default reading); `l2` W / ||W||_2 over HW;
        `max` W / (max_HW |W| + eps); `sigmoid` 1 / (1 + exp(-W)); `none` W, the
        literal formula.

    Returns:
      (B, H, W, 1) float32. An all-zero map stays zero (`sigmoid`: one half).
    """
    fields.check("normalise", kind, NORMALISATIONS)
    w = w.astype(jnp.float32)
    if kind == "mean":
        return w / (jnp.mean(jnp.abs(w), axis=(1, 2), keepdims=True) + _EPS)
    if kind == "max":
        return w / (jnp.max(jnp.abs(w), axis=(1, 2), keepdims=True) + _EPS)
    if kind == "l2":
        squares = jnp.sum(jnp.square(w), axis=(1, 2), keepdims=True)
        # The inner where keeps the gradient of an all-zero map finite.
        scale = jnp.where(squares > 0, squares, 1.0)
        return w * jnp.where(squares > 0, jax.lax.rsqrt(scale), 0.0)
    return jax.nn.sigmoid(w) if kind == "sigmoid" else w
