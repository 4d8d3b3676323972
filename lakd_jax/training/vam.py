"""Training support for virtual attention (`models.vam`)."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp

from lakd_jax.distill.base import method as method_lib
from lakd_jax.models import chain, folding, vam

PyTree = Any
TERM = "vam_entropy"


def with_entropy(
    losses: Sequence[method_lib.ModuleLoss],
    sown: Mapping[str, Any],
    *,
    epoch: jax.Array,
    gamma: float,
    owner: Callable[[Sequence[str]], int],
    starts: Sequence[float],
) -> tuple[method_lib.ModuleLoss, ...]:
    """Adds gamma H to a student's losses, with H the mean over its gated convolutions.

    Each module gets the share of its layers: their mean entropy as the term
    `vam_entropy`, weighted by gamma times their share of all layers. The sum therefore
    does not depend on where the student is cut.

    Args:
      losses: one per module.
      sown: the "intermediates" of the student's pass.
      gamma: weight of the entropy, 0 or more.
      owner: maps a path in the training state's parameters to the index of its module.
      epoch: the current epoch, a scalar.
      starts: the epoch from which each module's term counts; () starts all at once.
    """
    entropies: dict[int, list[jax.Array]] = collections.defaultdict(list)
    leaves: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(dict(sown))
    for path, value in leaves.items():
        if path[-1] == vam.ENTROPY:
            entropies[owner(("student", *path))].append(value)
    total = sum(map(len, entropies.values()))
    result = list(losses)
    for k, values in entropies.items():
        weight = gamma * len(values) / total
        if starts:
            weight = weight * jnp.float32(epoch >= starts[k])
        result[k] = dataclasses.replace(
            losses[k],
            terms={**losses[k].terms, TERM: jnp.mean(jnp.stack(values))},
            weights={**losses[k].weights, TERM: weight},
        )
    return tuple(result)


def deployed(model: chain.Chain, variables: PyTree) -> tuple[chain.Chain, PyTree]:
    """Folds the static gates of a trained student into its convolutions.

    Dynamic gates are part of the network and stay.
    """
    if model.vam is None or not model.vam.foldable:
        return model, variables
    return folding.fold_gates(model, variables)
