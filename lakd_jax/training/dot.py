"""The distillation-oriented trainer: separate momenta for task and distillation losses.

Source: Zhao et al., "DOT: A Distillation-Oriented Trainer" (arXiv 2307.08436). The
paper leaves open how to treat weight decay and parameters that only one of the losses
reaches; both follow the public code.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lakd_jax.distill.base import method
from lakd_jax.training import optim

PyTree = Any
TASK = ("head_ce", "task_ce")  # loss terms computed from the labels


class SplitGradients(NamedTuple):
    """Gradients or momentum buffers, kept separately for two groups of losses.

    Each field is a tree with the structure of the parameters.

    Attributes:
      task: for the losses computed from the labels.
      others: for all other losses.
    """

    task: PyTree
    others: PyTree


def losses(module_losses: Sequence[method.ModuleLoss]) -> tuple[jax.Array, jax.Array]:
    """Returns weighted sums, float32 scalars, of the task terms and of the others."""

    def weighted_sum(task: bool) -> jax.Array:
        selected = []
        for loss in module_losses:
            terms = {n: t for n, t in loss.terms.items() if (n in TASK) == task}
            selected.append(dataclasses.replace(loss, terms=terms))
        return method.total(selected)

    return weighted_sum(True), weighted_sum(False)


def sgd(
    learning_rate: optax.Schedule,
    *,
    momentum: float,
    delta: float,
    weight_decay: float,
    decay_mask: bool = False,
) -> optax.GradientTransformation:
    """Returns SGD that steps along the sum of two momentum buffers.

    The transformation takes its gradients as `SplitGradients`. The task buffer uses
    momentum - delta, the other one momentum + delta. For a parameter that only one
    group of losses reaches, such as a connector's, only that group's buffer matters,
    and it uses plain momentum. Weight decay is added to the task buffer, or to the
    other one where the task losses do not reach the parameter (the public code omits
    it there in the first step). A parameter counts as not reached if its gradient is
    all zeros in this step. The public code instead looks at which losses depend on the
    parameter, which differs where a loss weight is 0.
    """

    def init(params: PyTree) -> SplitGradients:
        return SplitGradients(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    # optax annotates a single tree of updates; this transformation takes two.
    def update(updates: Any, state: Any, params: PyTree | None = None) -> tuple:
        def leaf(
            task: jax.Array,
            others: jax.Array,
            task_buffer: jax.Array,
            others_buffer: jax.Array,
            param: jax.Array,
        ) -> SplitGradients:
            from_task, from_others = jnp.any(task != 0), jnp.any(others != 0)
            shift = jnp.where(from_task & from_others, delta, 0.0)
            decay = weight_decay * param
            only_others = from_others & ~from_task
            task += jnp.where(only_others, 0.0, decay)
            others += jnp.where(only_others, decay, 0.0)
            return SplitGradients(
                (momentum - shift) * task_buffer + task,
                (momentum + shift) * others_buffer + others,
            )

        decayed = optim.decayed(params, masked=decay_mask)
        pairs = jax.tree.map(leaf, *updates, *state, decayed)
        buffers = jax.tree.transpose(jax.tree.structure(params), None, pairs)
        return jax.tree.map(jnp.add, *buffers), buffers

    two_momenta = optax.GradientTransformation(init, update)
    return optax.chain(two_momenta, optax.scale_by_learning_rate(learning_rate))
