"""What AFD and RTK share: maps of taps, their distances, learnt similarity of taps.

Source: Ji, Heo, Park, "Show, Attend and Distill: Knowledge Distillation via
Attention-based Feature Matching" (AFD, AAAI 2021, arXiv 2102.02973). Taps are
activations (B, H, W, C) of blocks of any sizes (`chain.Outputs.taps`). AFD and RTK
differ in which network gives the queries and which the keys, and in how
attention and distances are put together; see `afd` and `rtk`. Everything is float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import ndam
from lakd_jax.distill.base import numerics
from lakd_jax.models import layers

Taps = Sequence[jax.Array]
Groups = tuple[tuple[int, ...], ...]

REDUCTIONS = ("sum", "mean")


def descriptors(taps: Taps) -> tuple[jax.Array, ...]:
    """Means over positions, (B, H, W, C) -> (B, C) float32 each."""
    return tuple(jnp.mean(t.astype(jnp.float32), (1, 2)) for t in taps)


def activation_map(tap: jax.Array) -> jax.Array:
    """m(F) = mean over channels of F^2, (B, H, W, C) -> (B, H, W) float32."""
    return jnp.mean(jnp.square(tap.astype(jnp.float32)), -1)


def by_size(taps: Taps) -> Groups:
    """Indices of the taps of each size (H, W), in the order of first appearance.

    In the networks here taps of one size are those of one stage (or, where a stage
    does not halve the image, of neighbouring ones).
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, tap in enumerate(taps):
        groups.setdefault(tap.shape[1:3], []).append(index)
    return tuple(map(tuple, groups.values()))


def unit_maps(taps: Taps) -> jax.Array:
    """Unit-length activation maps of taps of one size, (B, taps, H W)."""
    maps = jnp.stack([activation_map(t) for t in taps], 1)
    return numerics.unit(maps.reshape(*maps.shape[:2], -1))


def pooled_unit_maps(taps: Taps, height: int, width: int) -> jax.Array:
    """The same of taps of any sizes, their maps brought to (height, width) first.

    Adaptive average pooling; a smaller map is repeated (`ndam.adaptive_pool`). Maps
    of one size are pooled together, as channels.

    Args:
      taps: S arrays (B, H, W, C).
      height: of the result.
      width: of the result.

    Returns:
      (B, S, height * width) float32, each map of length 1 (or zero).
    """
    pooled: dict[int, jax.Array] = {}
    for group in by_size(taps):
        maps = jnp.stack([activation_map(taps[i]) for i in group], -1)
        maps = ndam.adaptive_pool(maps, height, width, jnp.mean)
        pooled |= {i: maps[..., place] for place, i in enumerate(group)}
    stacked = jnp.stack([pooled[i] for i in range(len(taps))], 1)
    return numerics.unit(stacked.reshape(*stacked.shape[:2], -1))


def squared_distances(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """||f - g||^2 of every pair of maps of length 1 or 0, as 1 + 1 - 2 cos.

    Args:
      ours: (B, S, N).
      theirs: (B, T, N).

    Returns:
      (B, S, T) float32 in [0, 2].
    """
    # The small difference of two numbers near 2: a product in the reduced precision
    # that accelerators multiply with would be all error.
    cosines = jnp.einsum("bsn,btn->bst", ours, theirs, precision="highest")
    ours, theirs = (jnp.sum(jnp.square(x), -1) for x in (ours, theirs))
    return jnp.maximum(ours[:, :, None] + theirs[:, None, :] - 2 * cosines, 0.0)


def distances(
    student: Taps, teacher: Taps, reduction: str, merge: jax.Array | None = None
) -> jax.Array:
    """Distance of every student tap to every teacher tap, at the teacher tap's size.

    Args:
      student: S taps (B, h, w, c).
      teacher: T taps (B, H, W, C); get no gradient.
      reduction: over positions; "sum" is ||f - g||^2 in [0, 2], "mean" divides it by
        H W (AFD).
      merge: (G, T) weights; the unit maps of the teacher taps of size g (see
        `by_size`) are added up by row g, and the sum brought to unit length. None
        keeps them apart.

    Returns:
      (B, S, T) float32; with `merge` (B, S, G).

    Raises:
      ValueError: unknown reduction.
    """
    fields.check("reduction", reduction, REDUCTIONS)
    groups, columns = by_size(teacher), []
    for row, group in enumerate(groups):
        height, width = teacher[group[0]].shape[1:3]
        theirs = jax.lax.stop_gradient(unit_maps([teacher[i] for i in group]))
        if merge is not None:
            weights = merge[row, jnp.array(group)]
            mean = jnp.einsum("n,bnp->bp", weights, theirs, precision="highest")
            theirs = numerics.unit(mean)[:, None]
        found = squared_distances(pooled_unit_maps(student, height, width), theirs)
        columns.append(found / (height * width) if reduction == "mean" else found)
    table, order = jnp.concatenate(columns, -1), sum(groups, ())
    if merge is not None or order == tuple(range(len(teacher))):
        return table
    return jnp.take(table, jnp.argsort(jnp.array(order)), -1)


class Similarity(nn.Module):
    """AFD's learnt similarity of descriptors, section "attention" of the paper.

    q_i = BN_i(W_i v_i + b_i), k_j = ReLU(BN_j(W_j u_j + b_j)); every key is expanded
    to one vector a query by Dense and BN that all keys share (the bilinear form);
    trainable positions add <p_i, p_j>; all is divided by sqrt(dim). The taps' batch
    norms are one over all their features, which is the same.

    Attributes:
      dim: d, of queries and keys.
    """

    dim: int

    @nn.compact
    def __call__(
        self,
        queries: Sequence[jax.Array],
        keys: Sequence[jax.Array],
        *,
        train: bool,
        merge: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of all pairs.

        Args:
          queries: Q descriptors (B, channels of the tap).
          keys: K descriptors (B, channels of the tap).
          train: normalise by this batch, and move the running statistics.
          merge: (M, K) weights that make M keys of the K, positions likewise, before
            they are expanded; None keeps them.

        Returns:
          (B, Q, K) float32; (B, Q, M) with `merge`.
        """
        q = self._embed("query", queries, train)
        k = nn.relu(self._embed("key", keys, train))
        positions = nn.initializers.xavier_normal()
        p_q = self.param("query_positions", positions, (len(queries), self.dim))
        p_k = self.param("key_positions", positions, (len(keys), self.dim))
        if merge is not None:
            k = jnp.einsum("mk,bkd->bmd", merge, k, precision="highest")
            p_k = jnp.matmul(merge, p_k, precision="highest")
        batch, count, width = *k.shape[:2], len(queries)
        k = k.reshape(batch * count, self.dim)
        k = self._norm("expand_bn", train)(self._dense("expand", width * self.dim)(k))
        k = k.reshape(batch, count, width, self.dim)
        logits = jnp.einsum("bqd,bkqd->bqk", q, k, precision="highest")
        logits += jnp.matmul(p_q, p_k.T, precision="highest")[None]
        return logits / jnp.sqrt(jnp.float32(self.dim))

    def _embed(self, role: str, values: Sequence[jax.Array], train: bool) -> jax.Array:
        """Dense and BN of each descriptor, (B, N, dim)."""
        parts = [
            self._dense(f"{role}{index}", self.dim)(v.astype(jnp.float32))
            for index, v in enumerate(values, 1)
        ]
        joined = self._norm(f"{role}_bn", train)(jnp.concatenate(parts, -1))
        return joined.reshape(-1, len(parts), self.dim)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, kernel_init=layers.uniform_fan_in, name=name)

    def _norm(self, name: str, train: bool) -> nn.Module:
        return layers.norm(layers.Style(jnp.float32), train=train, name=name)


def attention_diagnostics(attention: jax.Array, groups: Groups) -> dict[str, jax.Array]:
    """How the attention is spread, means over batch and queries.

    It is trained to lower a weighted distance, so it can collapse to pairs that
    already match: the entropy then falls, and one stage takes all.

    Args:
      attention: (B, queries, keys), rows that sum to 1.
      groups: the keys of each stage, as `by_size` gives them.

    Returns:
      `attention_entropy`, in nats, and `attention_stage1`, ..., the share of each
      stage of the keys' network; scalars float32 without gradient.
    """
    attention = jax.lax.stop_gradient(attention)
    entropy = jnp.mean(jnp.sum(jax.scipy.special.entr(attention), -1))
    shares = jnp.mean(attention, (0, 1))
    stages = {
        f"attention_stage{number}": jnp.sum(shares[jnp.array(group)])
        for number, group in enumerate(groups, 1)
    }
    return {"attention_entropy": entropy, **stages}


def taps_of(outputs: Any, part: str) -> tuple[jax.Array, ...]:
    """The taps of `chain.Outputs`; ValueError where the network has none.

    Args:
      outputs: of a whole pass.
      part: "student" or "teacher", for the message.
    """
    if not outputs.taps:
        raise ValueError(
            f"{part}: this network records no taps, which AFD and RTK compare; use one "
            "whose Outputs.taps are filled (every family of lakd_jax.models does)"
        )
    return outputs.taps
