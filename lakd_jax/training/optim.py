"""Learning-rate schedules and stochastic gradient descent, as PyTorch has it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lakd_jax.models import vam

PyTree = Any


def schedule(
    kind: str,
    lr: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[float],
    decay: float,
    warmup_epochs: float,
) -> optax.Schedule:
    """The learning rate at a step (counted from 0).

    `step` multiplies by `decay` once `milestones` epochs are complete, `cosine`
    falls to 0 at the last step, `constant` stays. Before that, `warmup_epochs`
    of linear growth from 0.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    total = epochs * steps_per_epoch
    if kind == "step":
        drops = {round(m * steps_per_epoch): decay for m in milestones}
        base = optax.piecewise_constant_schedule(lr, drops)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(lr, max(total - warmup, 1))
        base = lambda step: after(jnp.maximum(step - warmup, 0))  # noqa: E731
    else:
        base = optax.constant_schedule(lr)
    if not warmup:
        return base
    return lambda step: base(step) * jnp.minimum(1.0, (step + 1) / warmup)


def sgd(
    learning_rate: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    clip_norm: float,
    labels: PyTree,
) -> optax.GradientTransformation:
    """Clip per module, add weight decay, momentum, then the learning rate.

    VAM's gates are not decayed: that would pull them to uniform attention, against
    their entropy's term.

    The order is PyTorch's SGD: the decay enters the momentum buffer. `labels`
    (the module index of every parameter) says which gradients share a norm: a
    norm over all modules would couple them across the cuts.
    """
    mask = _decay_mask(labels)
    # Without a mask where nothing is left out, so that the state stays what it was.
    mask = None if all(jax.tree.leaves(mask)) else mask
    return optax.chain(
        clip_by_module_norm(clip_norm, labels) if clip_norm else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay_mask(tree: PyTree) -> PyTree:
    """Whether weight decay applies to each leaf of a tree of parameters or labels."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not vam.is_gate([key.key for key in path]), tree
    )


def decayed(params: PyTree) -> PyTree:
    """`params` with zeros where weight decay does not apply."""
    # A product, so that NaN and infinity are still seen by those who look for them.
    return jax.tree.map(
        lambda p, kept: p if kept else 0.0 * p, params, _decay_mask(params)
    )


def clip_by_module_norm(limit: float, labels: PyTree) -> optax.GradientTransformation:
    """Scales each module's gradient to a norm of at most `limit`."""

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple:
        del params
        norms = module_norms(updates, labels)
        scale = {k: jnp.minimum(1.0, limit / (n + 1e-12)) for k, n in norms.items()}
        return jax.tree.map(lambda u, k: u * scale[k], updates, labels), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def module_norms(tree: PyTree, labels: PyTree) -> dict[int, jax.Array]:
    """L2 norm over each module's leaves, keyed by module index."""
    leaves, indices = jax.tree.leaves(tree), jax.tree.leaves(labels)
    squares: dict[int, jax.Array] = {}
    for leaf, k in zip(leaves, indices, strict=True):
        squares[k] = squares.get(k, jnp.float32(0)) + jnp.sum(jnp.square(leaf))
    return {k: jnp.sqrt(s) for k, s in sorted(squares.items())}
