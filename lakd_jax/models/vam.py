"""Virtual attention in a convolution, for students under distillation.

Source: Xue et al., "KDExplainer: A Task-oriented Attention Model for Explaining
Knowledge Distillation" (IJCAI 2021, arXiv 2105.04181), which calls it the virtual
attention module (VAM). The authors did not publish its code, so this is our
interpretation: the channels of a convolution are grouped into virtual blocks, and each
block of outputs attends to the blocks of inputs,

    A  = softmax(V / tau) over the input blocks      one V (rows, M_in) per convolution
    W' = s W A[block of the output, block of the input],   s = M_in, so that a uniform
                                                           A leaves W as it is
    H  = mean over rows of -sum A log A / log M_in     in 0..1, to be minimised

With g groups every group has its own output blocks, so V has rows = g M_out. The static
gate does not depend on the image and is folded into the kernel after training. The
dynamic gate, V(x) = V + mean(x) U, is provided for comparison: it differs between
images and cannot be folded.
"""

import collections.abc
import dataclasses
import math
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields

GATES = ("static", "dynamic")
ENTROPY = "vam_entropy"  # the intermediate that a layer sows
_PARAMETERS = ("vam_gate", "vam_slope")  # V and U above; the gates of HME are others


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings shared by all gated convolutions of a network.

    `blocks` is M_in and M_out (where channels are not divisible by it, the largest
    divisor below it), `temperature` is tau, `init_std` the standard deviation of V at
    the start. With `rescale`, s is M_in; otherwise 1, and uniform attention divides the
    kernel by M_in.

    Raises:
        ValueError: a value out of range.
    """

    gate: str = fields.field(
        "static",
        "static (folded away at the end) | dynamic (by image, stays)",
        fields.one_of(GATES),
    )
    blocks: int = fields.field(
        4,
        "of inputs and of outputs; fewer where channels do not divide",
        fields.at_least(2),
    )
    temperature: float = fields.field(1.0, "of the attention", fields.above(0))
    rescale: bool = fields.field(
        True, "times the number of blocks: uniform attention changes nothing"
    )
    init_std: float = fields.field(
        0.0,
        "of the gates; 0: training starts from the plain network",
        fields.at_least(0),
    )

    def __post_init__(self):
        fields.require(self, "vam ")

    @property
    def foldable(self) -> bool:
        """Whether the gates can be folded into the kernels."""
        return self.gate == "static"

    def scale(self, gate: jax.Array) -> jax.Array:
        """Computes s A in float32, like the gate."""
        a = attention(gate, self.temperature)
        return a.shape[-1] * a if self.rescale else a


def is_gate(path: collections.abc.Sequence[str]) -> bool:
    """Returns whether the parameter at `path` belongs to the attention."""
    return path[-1] in _PARAMETERS


def num_blocks(channels: int, limit: int) -> int:
    """Returns the largest divisor of `channels` that is at most `limit`."""
    return max(m for m in range(1, limit + 1) if channels % m == 0)


def log_attention(gate: jax.Array, temperature: float) -> jax.Array:
    """Computes log A in float32 as (..., rows, M_in), like the gate."""
    return jax.nn.log_softmax(gate.astype(jnp.float32) / temperature, axis=-1)


def attention(gate: jax.Array, temperature: float) -> jax.Array:
    """Computes A in float32 as (..., rows, M_in), like the gate; rows sum to 1."""
    return jnp.exp(log_attention(gate, temperature))


def entropy(log_a: jax.Array) -> jax.Array:
    """Computes H from log A (..., rows, M_in) as a float32 scalar.

    It is 1 for uniform rows and 0 for one-hot rows. Leading axes (the images, for a
    dynamic gate) are averaged. M_in must be at least 2: the entropy of a row with one
    entry is always 0 and cannot be normalised.
    """
    rows = -jnp.sum(jnp.exp(log_a) * log_a, axis=-1)
    return jnp.mean(rows) / math.log(log_a.shape[-1])


def scaled_kernel(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Computes W' = W s A.

    Args:
        kernel: (kh, kw, C_in / groups, C_out).
        scale: s A (rows, M_in), rows = groups * M_out. Blocks are contiguous groups of
            channels, in order.

    Returns:
        W' in the kernel's shape, in float32.
    """
    rows, columns = scale.shape
    inputs, outputs = kernel.shape[2:]
    factor = jnp.repeat(scale.T, inputs // columns, axis=0)
    factor = jnp.repeat(factor, outputs // rows, axis=1)
    return kernel * factor[None, None]


def scaled_inputs(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Computes the inputs of one output block in each group of a convolution.

    Args:
        x: (B, H, W, C_in).
        scale: (B, groups, M_in), the block's rows of s A.

    Returns:
        x s A in the shape and dtype of x.
    """
    scale = scale.astype(x.dtype).reshape(x.shape[0], -1)
    scale = jnp.repeat(scale, x.shape[-1] // scale.shape[-1], 1)
    return x * scale[:, None, None, :]


class Conv(nn.Module):
    """A square convolution, padded evenly, with attention over virtual blocks.

    The kernel and bias are those of `nn.Conv`, with the same initial values, so without
    the gates the variables are the plain network's. If M_in or M_out would be 1 because
    the channels cannot be divided, it is a plain convolution without a gate. Sows H as
    `ENTROPY` in "intermediates".

    Attributes:
        features, size, stride, groups: of the convolution.
        bias: whether it has a bias.
        style: the network's `layers.Style`, with settings of the attention, which is
            float32 whatever the compute dtype.
    """

    features: int
    size: int
    stride: int
    groups: int
    bias: bool
    style: Any  # `layers` imports this module

    @property
    def options(self) -> Options:
        """The settings of the attention."""
        return self.style.vam

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
        inputs = x.shape[-1] // self.groups
        shape = (self.size, self.size, inputs, self.features)
        # Before the gates, since random numbers are drawn in the order of these lines.
        kernel = self.param("kernel", self.style.kernel_init, shape, jnp.float32)
        columns = num_blocks(inputs, self.options.blocks)
        blocks = num_blocks(self.features // self.groups, self.options.blocks)
        if min(columns, blocks) == 1:
            y = self._convolve(x, kernel)
        elif self.options.gate == "static":
            gate = self._gate(blocks, columns)
            self._record(gate)
            y = self._convolve(x, scaled_kernel(kernel, self.options.scale(gate)))
        else:
            y = self._dynamic(x, kernel, blocks, columns)
        if not self.bias:
            return y
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.style.dtype).reshape(1, 1, 1, -1)

    def _gate(self, blocks: int, columns: int) -> jax.Array:
        normal = nn.initializers.normal(self.options.init_std)
        shape = (self.groups * blocks, columns)
        return self.param("vam_gate", normal, shape, jnp.float32)

    def _dynamic(
        self, x: jax.Array, kernel: jax.Array, blocks: int, columns: int
    ) -> jax.Array:
        """Applies each image's own attention, with one convolution per output block.

        A single convolution over copies of the input, with more groups, computes the
        same, but its gradient takes XLA sixty times longer on CPU.
        """
        gate, zeros = self._gate(blocks, columns), nn.initializers.zeros
        shape = (x.shape[-1], *gate.shape)
        slope = self.param("vam_slope", zeros, shape, jnp.float32)
        pooled = jnp.mean(x, (1, 2), dtype=jnp.float32)
        gates = gate[None] + jnp.tensordot(pooled, slope, 1)
        self._record(gates)
        scale = self.options.scale(gates).reshape(-1, self.groups, blocks, columns)
        x = x.astype(self.style.dtype)
        split = kernel.reshape(*kernel.shape[:3], self.groups, blocks, -1)
        maps = []
        for j in range(blocks):
            scaled = scaled_inputs(x, scale[:, :, j])
            block_kernel = split[:, :, :, :, j].reshape(*kernel.shape[:3], -1)
            maps.append(self._convolve(scaled, block_kernel))
        order = "j b h w (g c) -> b h w (g j c)"
        return einops.rearrange(maps, order, g=self.groups)

    def _record(self, gate: jax.Array) -> None:
        value = entropy(log_attention(gate, self.options.temperature))
        # Stores the value itself instead of a tuple with one value per call.
        self.sow("intermediates", ENTROPY, value, reduce_fn=lambda _, new: new)

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        pad = (self.size - 1) // 2
        return jax.lax.conv_general_dilated(
            x.astype(self.style.dtype),
            kernel.astype(self.style.dtype),
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
