"""Several frozen teachers as one, whose logits are combined."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.models import chain, frozen

COMBINE = ("mean", "confidence")
_TINY = 1e-12  # keeps the shares of entropies defined where all are certain


@dataclasses.dataclass(frozen=True)
class Member:
    """A network of an ensemble, and how images in 0..255 become its input."""

    model: chain.Chain
    prepare: Callable[[jax.Array], jax.Array]


class Ensemble(frozen.Whole, kw_only=True):
    """Several networks of the same classes; all but the logits are the first one's.

    Its images are in 0..1, float32, and its parameters are the members' variables.

    Attributes:
        members: the networks; the other fields are those of the first.
        combine: how their logits are combined, one of `COMBINE`.
    """

    members: tuple[Member, ...]
    combine: str = "mean"

    @property
    def first(self) -> chain.Chain:
        """Returns the network whose features are compared."""
        return self.members[0].model

    @property
    def STEM_IN_FEATURES(self) -> bool:  # pyrefly: ignore[bad-override]
        """Returns whether the first network records its stem."""
        return self.first.STEM_IN_FEATURES

    @property
    def any_side(self) -> int:
        """A size of images that it takes: members resize them."""
        return self.first.any_side

    @nn.nowrap
    def as_map(self, h: jax.Array) -> jax.Array:
        """Returns the feature map (B, H, W, C) of what the first's unit passes on."""
        return self.first.as_map(h)

    def outputs(self, x: jax.Array) -> chain.Outputs:
        """Applies all networks; see `frozen.Whole`."""
        results: list[chain.Outputs] = []
        for i, member in enumerate(self.members, 1):
            variables = self.param(f"teacher{i}", _zeros, member.model)
            images = member.prepare(255 * x)
            outputs: Any = member.model.apply(variables, images, train=False)
            results.append(outputs)
        logits = combined([result.logits for result in results], self.combine)
        return dataclasses.replace(results[0], logits=logits, head_logits=())


def first(model: chain.Chain, variables: Any) -> tuple[chain.Chain, Any]:
    """Returns the first network of an ensemble with its variables, any other as it is.

    It is the one whose features are compared.
    """
    if not isinstance(model, Ensemble):
        return model, variables
    return model.first, variables["params"]["teacher1"]


def _zeros(_: jax.Array, model: chain.Chain) -> Any:
    shapes = chain.variable_shapes(model)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def combined(logits: Sequence[jax.Array], combine: str) -> jax.Array:
    """Returns the logits (B, K) of several networks combined, float32.

    "mean" averages them. "confidence" weights them per example by
    (1 - H_i / sum_j H_j) / (N - 1) with the entropies H of their softmax: Kwon et al.,
    "Adaptive Knowledge Distillation Based on Entropy" (ICASSP 2020), as the public code
    of CA-MKD has it, which weights losses; it reads no labels.

    Args:
        logits: of N networks, each (B, K).
        combine: one of `COMBINE`.
    """
    stacked = jnp.stack(logits).astype(jnp.float32)
    if combine == "mean" or len(logits) == 1:
        return jnp.mean(stacked, 0)
    entropy = -jnp.sum(jax.nn.softmax(stacked) * jax.nn.log_softmax(stacked), -1)
    entropy = entropy + _TINY
    share = entropy / jnp.sum(entropy, 0, keepdims=True)
    weights = (1 - share) / (len(logits) - 1)
    return jnp.sum(weights[..., None] * stacked, 0)
