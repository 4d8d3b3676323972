"""Learning-rate schedules, and SGD with PyTorch's semantics."""

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
    """Returns the learning rate as a function of the step, counted from 0.

    `step` multiplies it by `decay` after each of the `milestones` (in epochs), `cosine`
    decreases it to 0 at the last step, and `constant` keeps it. It grows linearly from
    0 during the first `warmup_epochs`.
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
    """Returns SGD with gradient clipping per module, weight decay and momentum.

    The order is that of PyTorch's SGD, where the decay enters the momentum buffer. VAM
    gates are not decayed, since decay would pull them to uniform attention, against
    their entropy term. Clipping takes one norm per module, as given by `labels` (the
    module index of every parameter): a norm over all modules would couple them across
    the cuts.
    """
    mask = _decay_mask(labels)
    # A mask changes the structure of the optimiser's state, so there is none if it
    # would exclude nothing.
    mask = None if all(jax.tree.leaves(mask)) else mask
    return optax.chain(
        clip_by_module_norm(clip_norm, labels) if clip_norm else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay_mask(tree: PyTree) -> PyTree:
    """Returns, for each leaf of parameters or labels, whether weight decay applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not vam.is_gate([key.key for key in path]), tree
    )


def decayed(params: PyTree) -> PyTree:
    """Returns `params` with zeros where weight decay does not apply."""
    # A product keeps NaN and infinity visible to the checks for non-finite values.
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
    """Returns the L2 norm over each module's leaves, keyed by module index."""
    leaves, indices = jax.tree.leaves(tree), jax.tree.leaves(labels)
    squares: dict[int, jax.Array] = {}
    for leaf, k in zip(leaves, indices, strict=True):
        squares[k] = squares.get(k, jnp.float32(0)) + jnp.sum(jnp.square(leaf))
    return {k: jnp.sqrt(s) for k, s in sorted(squares.items())}
