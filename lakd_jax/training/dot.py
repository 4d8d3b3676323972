"""The distillation-oriented trainer: momenta apart for labels and for the teacher.

Source: Zhao et al., "DOT: A Distillation-Oriented Trainer" (arXiv 2307.08436); what
becomes of weight decay, and of parameters that one of the two never reaches, is the
public code's.
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
TASK = ("head_ce", "task_ce")  # the terms that are of the labels


class Apart(NamedTuple):
    """Gradients or momentum buffers, each a tree like the parameters'.

    Attributes:
      task: of the losses with the labels.
      others: of all other losses.
    """

    task: PyTree
    others: PyTree


def losses(module_losses: Sequence[method.ModuleLoss]) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the labels' terms and that of all others, scalars float32."""

    def part(task: bool) -> jax.Array:
        kept = [
            {name: term for name, term in loss.terms.items() if (name in TASK) == task}
            for loss in module_losses
        ]
        pairs = zip(module_losses, kept, strict=True)
        return method.total([dataclasses.replace(x, terms=terms) for x, terms in pairs])

    return part(True), part(False)


def sgd(
    learning_rate: optax.Schedule, *, momentum: float, delta: float, weight_decay: float
) -> optax.GradientTransformation:
    """Gradient descent with the sum of two momentum buffers; it takes `Apart`.

    The labels' buffer keeps momentum - delta, that of the others momentum + delta. A
    parameter that only one of the two reaches, such as a connector's, has one buffer
    that counts, and this keeps momentum. Weight decay enters the labels' buffer, or the
    other where the labels do not reach (the public code leaves it out there in the
    first step). "Not reached" is a gradient of nothing but zeros in this step: the
    public code asks what the losses depend on, which differs where a weight is 0.
    """

    def init(params: PyTree) -> Apart:
        return Apart(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    # optax has one tree of updates in mind where here are two.
    def update(updates: Any, state: Any, params: PyTree | None = None) -> tuple:
        def leaf(
            task: jax.Array,
            others: jax.Array,
            task_buffer: jax.Array,
            others_buffer: jax.Array,
            param: jax.Array,
        ) -> Apart:
            by_task, by_others = jnp.any(task != 0), jnp.any(others != 0)
            shift = jnp.where(by_task & by_others, delta, 0.0)
            decay = weight_decay * param
            late = by_others & ~by_task
            task += jnp.where(late, 0.0, decay)
            others += jnp.where(late, decay, 0.0)
            return Apart(
                (momentum - shift) * task_buffer + task,
                (momentum + shift) * others_buffer + others,
            )

        both = jax.tree.map(leaf, *updates, *state, optim.decayed(params))
        moved = jax.tree.transpose(jax.tree.structure(params), None, both)
        return jax.tree.map(jnp.add, *moved), moved

    apart = optax.GradientTransformation(init, update)
    return optax.chain(apart, optax.scale_by_learning_rate(learning_rate))
