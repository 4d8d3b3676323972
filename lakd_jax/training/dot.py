"""SGD with a momentum for each group of loss terms: DOT and DeepKD.

Source: Zhao et al., "DOT: A Distillation-Oriented Trainer" (arXiv 2307.08436). The
paper leaves open how to treat weight decay and parameters that only one of the losses
reaches; both follow the public code. Huang et al. (DeepKD, arXiv 2505.15133) split the
losses into three groups, see `lakd_jax.distill.deepkd`.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lakd_jax.distill.base import method
from lakd_jax.training import optim

PyTree = Any


class Group(NamedTuple):
    """Loss terms with a momentum of their own.

    Attributes:
      name: of the group, and of its momentum buffer in checkpoints.
      shift: what is added to the momentum.
      terms: the names of the terms; () for all that no other group has.
      decays: whether weight decay is part of this group's gradient.
    """

    name: str
    shift: float
    terms: tuple[str, ...] = ()
    decays: bool = False


Groups = tuple[Group, ...]


def of_delta(delta: float) -> Groups:
    """Returns DOT's two groups, whose momenta differ by 2 `delta`."""
    return (
        Group("task", -delta, method.TASK, decays=True),
        Group("others", delta),
    )


@functools.cache
def _container(names: tuple[str, ...]) -> Any:
    # Type checkers want to know the names, which depend on the method.
    make: Any = functools.partial(collections.namedtuple, "SplitGradients")
    return make(names)


def split(groups: Groups, trees: Sequence[PyTree]) -> Any:
    """Returns a named tuple of one tree per group: gradients, or momentum buffers."""
    return _container(tuple(group.name for group in groups))(*trees)


def summed(trees: Sequence[PyTree]) -> PyTree:
    """Returns the sum of the trees of all groups."""
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), trees)


def losses(
    groups: Groups, module_losses: Sequence[method.ModuleLoss]
) -> tuple[jax.Array, ...]:
    """Returns the weighted sum of each group's terms, float32 scalars."""
    named = {name for group in groups for name in group.terms}

    def weighted_sum(group: Group) -> jax.Array:
        selected = []
        for loss in module_losses:
            terms = {
                name: term
                for name, term in loss.terms.items()
                if (name in group.terms if group.terms else name not in named)
            }
            selected.append(dataclasses.replace(loss, terms=terms))
        return method.total(selected)

    return tuple(map(weighted_sum, groups))


def sgd(
    learning_rate: optax.Schedule,
    groups: Groups,
    *,
    momentum: float,
    weight_decay: float,
    decay_mask: bool = False,
) -> optax.GradientTransformation:
    """Returns SGD that steps along the sum of the groups' momentum buffers.

    The transformation takes its gradients as `split` returns them. A group's buffer
    uses momentum + shift. For a parameter that only one group reaches, such as a
    connector's, only that group's buffer matters, and it uses momentum + the mean of
    all shifts. Weight decay is added to the gradient of the group that `decays`, or to
    that of the first one that reaches the parameter if that group does not. A parameter
    counts as not reached if its gradient is all zeros in this step. The public codes
    instead look at which losses depend on the parameter, which differs where a loss
    weight is 0.
    """
    count = len(groups)
    alone = sum(group.shift for group in groups) / count
    by_decay = sorted(range(count), key=lambda i: not groups[i].decays)

    def init(params: PyTree) -> Any:
        zeros = (jax.tree.map(jnp.zeros_like, params) for _ in groups)
        return split(groups, tuple(zeros))

    # optax annotates a single tree of updates; this transformation takes several.
    def update(updates: Any, state: Any, params: PyTree | None = None) -> tuple:
        def leaf(*arrays: jax.Array) -> Any:
            grads, buffers, param = arrays[:count], arrays[count:-1], arrays[-1]
            reached = [jnp.any(grad != 0) for grad in grads]
            several = sum(r.astype(jnp.int32) for r in reached) > 1
            decay = weight_decay * param
            homes = _first_true([reached[i] for i in by_decay])
            is_home = dict(zip(by_decay, homes, strict=True))
            new = []
            for i, group in enumerate(groups):
                shift = jnp.where(several, group.shift, alone)
                grad = grads[i] + jnp.where(is_home[i], decay, 0.0)
                new.append((momentum + shift) * buffers[i] + grad)
            return split(groups, new)

        decayed = optim.decayed(params, masked=decay_mask)
        trees = jax.tree.map(leaf, *updates, *state, decayed)
        buffers = jax.tree.transpose(jax.tree.structure(params), None, trees)
        return summed(buffers), buffers

    several_momenta = optax.GradientTransformation(init, update)
    return optax.chain(several_momenta, optax.scale_by_learning_rate(learning_rate))


def _first_true(flags: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns which flag is the first that is true; the first one if none is."""
    none_before, found = jnp.bool_(True), []
    for flag in flags:
        found.append(flag & none_before)
        none_before &= ~flag
    found[0] |= none_before
    return found
