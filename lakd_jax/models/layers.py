"""Layers with PyTorch's padding, initialisation and constants of norms."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.models import pooling
from lakd_jax.models import projector as projector_lib
from lakd_jax.models import vam as vam_lib

EPSILON = 1e-5  # for every batch norm

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Uniform on +-1/sqrt(fan_in): the variance is a third of the squared bound.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# For the linear layers of VGG, MobileNetV2 and HME.
small_normal = nn.initializers.normal(0.01)

# For transformers and ConvNeXt: PyTorch's truncated normal, which is cut off only at
# +-2, a hundred deviations away.
token_normal = nn.initializers.normal(0.02)

gelu = functools.partial(jax.nn.gelu, approximate=False)


@dataclasses.dataclass(frozen=True)
class Style:
    """Settings shared by all layers of a network.

    Attributes:
        dtype: compute dtype of convolutions, classifiers and norms.
        folded: whether batch norms are folded into the convolutions before them (see
            `models.folding`); such a network is for inference only.
        kernel_init: initialiser of the convolutions; by default He et al. 2015,
            "Delving Deep into Rectifiers", with the fan-out.
        vam: attention in the convolutions that are `gated`; None for none.
        projector: what the head has before a classifier of another network; None for a
            head with its own.
        one_pass: whether batch norms take mean and variance in one pass.
    """

    dtype: Any = jnp.float32
    folded: bool = False
    kernel_init: Callable[..., jax.Array] = he_normal_fan_out
    vam: vam_lib.Options | None = None
    projector: projector_lib.Options | None = None
    one_pass: bool = False


def conv(
    features: int,
    kernel: int,
    stride: int,
    style: Style,
    *,
    name: str,
    groups: int = 1,
    bias: bool = False,
    gated: bool = False,
) -> nn.Module:
    """Makes a square convolution, padded evenly by (kernel - 1) / 2.

    The padding is explicit because "SAME" pads strided convolutions on the far side
    only, which is not what PyTorch networks were trained with. A `gated` convolution
    has virtual attention if the network's style has `vam`.
    """
    if gated and style.vam is not None:
        return vam_lib.Conv(features, kernel, stride, groups, bias, style, name=name)
    pad = (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=bias,
        dtype=style.dtype,
        kernel_init=style.kernel_init,
        name=name,
    )


def patches(features: int, size: int, style: Style, *, name: str) -> nn.Conv:
    """Makes a convolution of squares that do not overlap: kernel = stride, no padding.

    Pixels beyond the last whole square are not read.
    """
    return nn.Conv(
        features,
        (size, size),
        strides=(size, size),
        padding="VALID",
        dtype=style.dtype,
        kernel_init=style.kernel_init,
        name=name,
    )


def conv_norm(
    x: jax.Array,
    features: int,
    kernel: int,
    stride: int,
    style: Style,
    *,
    train: bool,
    name: str,
    bias: bool = False,
    **options: Any,
) -> jax.Array:
    """Applies the convolution `name` (see `conv`) and its batch norm.

    For use in a compact method. The norm's name has "bn" in place of "conv" ("conv1"
    and "bn1"), by which `models.folding` pairs them.
    """
    options["bias"] = bias or style.folded
    x = conv(features, kernel, stride, style, name=name, **options)(x)
    if style.folded:
        return x
    return norm(style, train=train, name=name.replace("conv", "bn"))(x)


def norm(style: Style, *, train: bool, name: str | None) -> nn.Module:
    """Makes a batch norm over the global batch, with statistics in float32.

    Epsilon 1e-5 and decay 0.9 correspond to PyTorch's 1e-5 and momentum 0.1. Running
    variances average the biased batch variance (PyTorch: the unbiased one; they differ
    by a factor n / (n - 1) with n = batch * height * width). The variance takes two
    passes by default: E[x^2] - E[x]^2 (`one_pass`) loses six digits where a channel's
    mean is a thousand times its deviation, and was no faster on CPU.

    Folding leaves the scale and shift of a norm that follows no convolution.
    """
    if style.folded:
        return Affine(style.dtype, name=name)
    options: Any = {} if name else {"parent": None}  # unnamed: used outside a network
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=EPSILON,
        dtype=style.dtype,
        use_fast_variance=style.one_pass,
        name=name,
        **options,
    )


def layer_norm(style: Style, *, name: str) -> nn.Module:
    """Makes a layer norm over channels, with statistics in float32.

    Epsilon is 1e-6, as in the published transformers and ConvNeXts, where PyTorch's
    default is 1e-5.
    """
    return nn.LayerNorm(
        epsilon=1e-6, dtype=style.dtype, use_fast_variance=False, name=name
    )


def drop_path(
    x: jax.Array, rate: float, *, train: bool, name: str | None = None
) -> jax.Array:
    """Applies stochastic depth (Huang et al. 2016, arXiv 1603.09382) to a branch.

    In training the branch is zero for a share `rate` of the examples, and scaled by
    1 / (1 - rate) for the others. For use in a compact method; reads the random numbers
    "dropout" unless the rate is 0.
    """
    if rate == 0 or not train:
        return x
    axes = tuple(range(1, x.ndim))
    return nn.Dropout(rate, broadcast_dims=axes, name=name)(x, deterministic=False)


def share_of_depth(rate: float, unit: int, steps: int) -> float:
    """Returns a unit's rate of `drop_path`: 0 at unit 0, growing to `rate` at `steps`.

    Zero if there is nothing to grow over.
    """
    return rate * unit / steps if steps else 0.0


class Affine(nn.Module):
    """x * scale + bias per channel: a batch norm with its statistics folded in."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., C) to the same shape, in `dtype`."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        axes = tuple(range(x.ndim - 1))
        scale, bias = (
            jnp.expand_dims(v, axes).astype(self.dtype) for v in (scale, bias)
        )
        return x.astype(self.dtype) * scale + bias


def max_pool(x: jax.Array, window: int, stride: int, pad: int) -> jax.Array:
    """Returns the maximum of each square window of (B, H, W, C), ignoring padding."""
    pads = ((pad, pad), (pad, pad))
    # By name: jax2onnx replaces this function by one that takes only these.
    strides = (stride, stride)
    return nn.max_pool(x, window_shape=(window, window), strides=strides, padding=pads)


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Moves channel c of group g to c * groups + g (ShuffleNet, section 3.1)."""
    return einops.rearrange(x, "... (g c) -> ... (c g)", g=groups)


class Stem(nn.Module):
    """Convolution, batch norm, activation.

    Attributes:
        features, kernel, stride: of the convolution.
        style: settings shared by the network's layers.
        activation: applied after the norm.
    """

    features: int
    kernel: int
    stride: int
    style: Style
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps images (B, H, W, 3) to two equal arrays (B, H', W', features)."""
        size = (self.features, self.kernel, self.stride)
        x = conv_norm(x, *size, self.style, train=train, name="conv")
        x = self.activation(x)
        return x, x


class Projector(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU.

    A map that is larger than `projector.Options.pooled` is pooled to that first.

    Attributes:
        style: settings shared by the network's layers, with those of the projector.
    """

    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (B, H, W, C) to (B, H', W', width)."""
        options: Any = self.style.projector
        style = dataclasses.replace(self.style, kernel_init=uniform_fan_in)
        if options.pooled:
            height, width = options.pooled
            x = pooling.adaptive_pool(x, height, width, jnp.mean)
        sizes = ((options.inner, 1), (options.inner, 3), (options.width, 1))
        for i, (features, kernel) in enumerate(sizes, 1):
            size = (features, kernel, 1)
            x = nn.relu(conv_norm(x, *size, style, train=train, name=f"conv{i}"))
        return x


class Borrowed(nn.Module):
    """A linear layer of another network, which is not trained.

    Attributes:
        features: of the result.
        dtype: compute dtype.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, D) to (B, features)."""
        kernel = self.param(
            "kernel", uniform_fan_in, (x.shape[-1], self.features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = (
            v.astype(self.dtype)
            for v in (x, *map(jax.lax.stop_gradient, (kernel, bias)))
        )
        return x @ kernel + jnp.expand_dims(bias, 0)


class Head(nn.Module):
    """Global average pool and linear classifier, with optional layers before them.

    Attributes:
        num_classes: width of the logits.
        style: settings shared by the network's layers.
        kernel_init: initialiser of the classifier; by default that of torch's Linear.
        zero_bias: whether the bias starts at zero instead of as torch's Linear does.
        conv_features: channels of a (gated) 1x1 convolution with batch norm and
            `activation` before the pool; 0 for none.
        activation: applied after that convolution.
        entry_norm: whether a batch norm and ReLU come first, as pre-activation networks
            need.
        pooled_norm: whether a layer norm follows the pool, before the classifier.
        dropout: share of the pooled channels that are dropped in training.

    With `style.projector` it is the projector, the pool and a borrowed classifier,
    after the norm and ReLU of `entry_norm` if the family has these. The convolution,
    the layer norm and dropout before the family's own classifier are left out with it.
    """

    num_classes: int
    style: Style
    kernel_init: Callable[..., jax.Array] = uniform_fan_in
    zero_bias: bool = False
    conv_features: int = 0
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    entry_norm: bool = False
    pooled_norm: bool = False
    dropout: float = 0.0

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to logits (B, classes) and pooled (B, C)."""
        return self.with_map(x, train=train)[:2]

    @nn.compact
    def with_map(
        self, x: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns also the map (B, H', W', C) that pooled is the mean of, if any."""
        if self.entry_norm:
            x = nn.relu(norm(self.style, train=train, name="entry_bn")(x))
        if options := self.style.projector:
            x = Projector(self.style, name=options.name)(x, train=train)
            pooled = jnp.mean(x, (1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
            name = projector_lib.BORROWED
            logits = Borrowed(self.num_classes, self.style.dtype, name=name)(pooled)
            return logits, pooled, x
        if self.conv_features:
            size = (self.conv_features, 1, 1)
            layer = functools.partial(conv_norm, train=train, name="conv", gated=True)
            x = self.activation(layer(x, *size, self.style))
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        last_map = None if self.pooled_norm else x
        pooled = jnp.mean(x, (1, 2), dtype=dtype)
        if self.pooled_norm:
            style = dataclasses.replace(self.style, dtype=dtype)
            pooled = layer_norm(style, name="norm")(pooled)
        bound = 0.0 if self.zero_bias else 1 / math.sqrt(pooled.shape[-1])
        dense = nn.Dense(
            self.num_classes,
            dtype=self.style.dtype,
            kernel_init=self.kernel_init,
            bias_init=lambda key, shape, dtype: jax.random.uniform(
                key, shape, dtype, -bound, bound
            ),
            name="dense",
        )
        if not (self.dropout and train):
            return dense(pooled), pooled, last_map
        drop = nn.Dropout(self.dropout, deterministic=False, name="dropout")
        return dense(drop(pooled)), pooled, last_map
