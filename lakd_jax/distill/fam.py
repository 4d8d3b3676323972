"""Frequency attention: students' features filtered by frequency, then compared.

Source: Pham et al., "Frequency Attention for Knowledge Distillation" (WACV 2024, pages
2277 to 2286), the variant on knowledge review; structure, sizes and initial values of
the public code. The fusion of stages is that of knowledge review (arXiv 2104.09044)
with attention in place of convolutions.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import fitnet, ndam, review
from lakd_jax.distill.base import adapter, method, term
from lakd_jax.models import layers

_WINDOW = 3  # of the attention, in positions


def feature_loss(
    student_features: Sequence[jax.Array], teacher_features: Sequence[jax.Array]
) -> jax.Array:
    """Sum over stages of the mean squared errors.

    Args:
      student_features: (B, H, W, C) each, filtered.
      teacher_features: as many, of the same shapes; they get no gradient.

    Returns:
      Scalar float32, never negative.
    """
    pairs = zip(student_features, teacher_features, strict=True)
    return sum((fitnet.hint_loss(*pair) for pair in pairs), jnp.float32(0))


def high_pass(height: int, width: int, cutoff: float) -> jax.Array:
    """0 at the lowest frequencies of a 2D FFT, 1 elsewhere.

    Of n frequencies on an axis, r = floor(cutoff * floor(n / 2)) on each side of zero
    count as low: -r up to r - 1, as in the public code. A position is low where both
    axes are; small maps keep all.

    Args:
      height, width: of the map.
      cutoff: from 0 to 1.

    Returns:
      (height, width) float32, in the order of `jnp.fft.fft2`.
    """
    rows, columns = (_is_low(n, cutoff) for n in (height, width))
    return 1.0 - jnp.outer(rows, columns).astype(jnp.float32)


def _is_low(count: int, cutoff: float) -> jax.Array:
    reach = int(cutoff * (count // 2))
    frequency = (jnp.arange(count) + count // 2) % count - count // 2
    return (frequency >= -reach) & (frequency < reach)


class Filter(nn.Module):
    """The frequency attention module: half a filter of frequencies, half a 1x1 conv.

    The global branch multiplies each frequency's channels by a complex matrix of its
    own and drops the lowest ones; the local branch is a 1x1 convolution. The shares of
    both are trained, too, and start at 1/2.

    Attributes:
      features: channels of the result.
      cutoff: see `high_pass`.
    """

    features: int
    cutoff: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) float32 -> (B, H, W, features); H and W are fixed by `init`."""
        height, width, channels = x.shape[1:]
        shape = (height, width, channels, self.features)
        # A pair of real arrays, as optimisers and checkpoints need them.
        start = nn.initializers.uniform(1 / (channels * self.features))
        real = self.param("real", start, shape)
        imaginary = self.param("imaginary", start, shape)
        spectrum = jnp.fft.fft2(x, axes=(1, 2), norm="ortho")
        mixed = jnp.einsum(
            "bhwi,hwio->bhwo", spectrum, jax.lax.complex(real, imaginary)
        )
        kept = mixed * high_pass(height, width, self.cutoff)[None, ..., None]
        everywhere = jnp.fft.ifft2(kept, axes=(1, 2), norm="ortho").real
        bound = nn.initializers.uniform(2 / channels**0.5)
        local = nn.Conv(
            self.features,
            (1, 1),
            kernel_init=layers.uniform_fan_in,
            bias_init=lambda *args: bound(*args) - 1 / channels**0.5,
            name="local",
        )
        half = nn.initializers.constant(0.5)
        shares = [self.param(f"share_{n}", half, ()) for n in ("global", "local")]
        return shares[0] * everywhere + shares[1] * local(x)


class Fusion(nn.Module):
    """Attention of a deeper stage's features over a shallower one's neighbourhoods.

    Each channel by itself: the query's value times the nine keys around the position
    gives nine weights, by softmax, of the nine values there. Beyond the border keys
    and values are 0. Half the channels' keys know their row, the others' their column.
    (The public code's groups of channels have no effect.) With an odd number of
    channels, which that code refuses, the second half is the larger one.
    """

    @nn.compact
    def __call__(self, x: jax.Array, queries: jax.Array) -> jax.Array:
        """(B, H, W, C) and (B, H, W, C), float32 -> (B, H, W, C)."""
        channels = x.shape[-1]
        parts = {n: self._project(channels, n) for n in ("query", "key", "value")}
        keys = _neighbours(parts["key"](x)) + self._places(channels)[None, None, None]
        weights = jax.nn.softmax(parts["query"](queries)[..., None, :] * keys, axis=-2)
        return jnp.sum(weights * _neighbours(parts["value"](x)), -2)

    def _project(self, channels: int, name: str) -> nn.Conv:
        return nn.Conv(
            channels,
            (1, 1),
            use_bias=False,
            kernel_init=layers.he_normal_fan_out,
            name=name,
        )

    def _places(self, channels: int) -> jax.Array:
        """(9, C), what is added to the keys."""
        normal, half = nn.initializers.normal(1.0), channels // 2
        row = self.param("row", normal, (_WINDOW, 1, half))
        column = self.param("column", normal, (1, _WINDOW, channels - half))
        square = (_WINDOW, _WINDOW)
        both = [jnp.broadcast_to(p, square + p.shape[-1:]) for p in (row, column)]
        return jnp.concatenate(both, -1).reshape(-1, channels)


def _neighbours(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, 9, C), row by row, zeros beyond the border."""
    height, width = x.shape[1:3]
    border = _WINDOW // 2
    padded = jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    shifted = [
        padded[:, i : i + height, j : j + width]
        for i in range(_WINDOW)
        for j in range(_WINDOW)
    ]
    return jnp.stack(shifted, -2)


class Level(nn.Module):
    """One stage of the student, fused with what the stage behind it hands on; float32.

    Attributes:
      features: channels of the teacher's map.
      cutoff: see `high_pass`.
    """

    features: int
    cutoff: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deeper: jax.Array | None,
        size: Sequence[int],
        *,
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Of the student's map and of what the deeper stage handed on.

        Args:
          x: (B, H, W, C).
          deeper: (B, H', W', C'), or None: nothing comes behind.
          size: of the teacher's map.
          train: whether to normalise by the statistics of this batch.

        Returns:
          (B, *size, features) for the loss and (B, *size, C) to hand on.
        """
        x = x.astype(jnp.float32)
        if deeper is not None:
            if deeper.shape[-1] != x.shape[-1]:
                narrow = adapter.Adapter(x.shape[-1], name="narrow")
                deeper = nn.relu(narrow(deeper, train=train))
            queries = ndam.resize_nearest(deeper, *x.shape[1:3])
            x = Fusion(name="fusion")(x, queries)
        fused = ndam.resize_nearest(x, *size)
        filtered = Filter(self.features, self.cutoff, name="filter")(fused)
        norm = adapter.batch_norm(train=train, name="norm")
        return nn.relu(norm(filtered)), fused


class FAM(term.Term):
    """ce_weight CE + weight * `feature_loss` of all stages and the pooled features.

    From the last stage to the first, each is fused with what the one behind hands on,
    brought to the teacher's size (nearest) and passed through a `Filter`, batch norm
    and ReLU. The pooled features are the very last, as a map of one position. Between
    stages of other widths are a 1x1 convolution, batch norm and ReLU
    (`adapter.Adapter`, whose initial weights are normal, not uniform, with the same
    variance).

    Each module has the loss of its own stage, the last also that of the pooled
    features. But the loss of a stage trains the later ones, too, through what these
    hand on: `local.cut_scale` 0 only keeps gradients from crossing a cut downwards.
    """

    weight: float = 0.8
    warmup_epochs: float = 20.0
    cutoff: float = fields.field(
        0.1,
        "share of the frequencies that counts as low and is dropped",
        fields.between(0, 1),
    )

    title: ClassVar[str] = "FAM-KD"
    about: ClassVar[str] = "1 for 110-20 and 110-32, 5 for WRN"
    staged: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints", "pooled")

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `fam`, one per module."""
        ours = (*signals.student_joints, review.as_map(signals.student.pooled))
        theirs = (*signals.teacher_joints, review.as_map(signals.teacher.pooled))

        def level(name: str, features: int) -> Level:
            return Level(features, self.cutoff, name=name)

        filtered = review.from_the_last(level, ours, theirs, train=train)
        values = list(map(fitnet.hint_loss, filtered, theirs))
        return [{"fam": value} for value in review.by_module(values)]


METHODS = {"fam": FAM}
ORDER = 290  # in lists of methods
