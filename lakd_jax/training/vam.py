"""The part of virtual attention (`models.vam`) that training has to know of."""

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
    """Adds gamma H to a student's losses, H the mean over its gated convolutions.

    Every module gets the part of its own layers: the mean entropy of those as the term
    `vam_entropy`, weighted by gamma times their share of all layers. So the sum does
    not depend on where the student is cut.

    Args:
      losses: one a module.
      sown: "intermediates" of the student's pass.
      gamma: 0 or more.
      owner: path in the training state's parameters -> index of the module.
      epoch: scalar.
      starts: the epoch before which a module's term has no weight; () for none.
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
    """A trained student without what only training needs: static gates are folded.

    Dynamic ones belong to the network and stay.
    """
    if model.vam is None or not model.vam.foldable:
        return model, variables
    return folding.fold_gates(model, variables)


def completed(given: PyTree, initial: PyTree) -> PyTree:
    """`given` parameters, which may lack gates, with those of `initial` added."""
    start: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(initial)
    own: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(given)
    fresh = {path: x for path, x in start.items() if vam.is_gate(path)}
    return flax.traverse_util.unflatten_dict({**fresh, **own})
