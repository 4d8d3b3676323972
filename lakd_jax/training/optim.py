"""Learning-rate schedules, and the optimisers: optax's, clipped per module."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lakd_jax.config import optimiser
from lakd_jax.models import projector, vam

PyTree = Any
# Parameters of more than one axis that `optim.decay_mask` leaves out.
_UNDECAYED = ("bias", "pos_embed", "cls_token", "dist_token")


def schedule(
    kind: str,
    lr: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[float],
    decay: float,
    warmup_epochs: float,
    floor: float = 0.0,
    cosine_from: str = "warmup",
    start: float = 0.0,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    `step` multiplies it by `decay` after each of the `milestones` (in epochs), `cosine`
    decreases it to `floor` at the last step, and `constant` keeps it. During the first
    `warmup_epochs` it grows linearly, from `start` in the first step, or by equal parts
    from the first of them if `start` is 0. The cosine begins at the end of the warm-up,
    or, with `cosine_from` "start", at step 0, so that the warm-up hides its beginning.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    total = epochs * steps_per_epoch
    if kind == "step":
        drops = {round(m * steps_per_epoch): decay for m in milestones}
        base = optax.piecewise_constant_schedule(lr, drops)
    elif kind == "cosine":
        begin = warmup if cosine_from == "warmup" else 0
        after = optax.cosine_decay_schedule(lr, max(total - begin, 1), floor / lr)
        base = lambda step: after(jnp.maximum(step - begin, 0))  # noqa: E731
    else:
        base = optax.constant_schedule(lr)
    if not warmup:
        return base
    if not start:
        return lambda step: base(step) * jnp.minimum(1.0, (step + 1) / warmup)
    ramp = optax.linear_schedule(start, lr, warmup)
    return lambda step: jnp.where(jnp.asarray(step) < warmup, ramp(step), base(step))


def create(
    options: optimiser.Optim, learning_rate: optax.Schedule, labels: PyTree
) -> optax.GradientTransformation:
    """Returns the optimiser that `options` describe, without DOT.

    Each is optax's of that name, after clipping per module as in `sgd`. The decay of
    adam is part of the gradient, as in PyTorch's Adam; that of adamw, lamb and lion is
    added to the update, so that the learning rate scales it. LAMB's trust ratio has one
    norm per array. States have one array per parameter, or scalars that are the same
    for all modules, so modules can be trained one by one.

    Args:
      options: the `optim` block.
      learning_rate: a function of the step, counted from 0.
      labels: the module index of every parameter.
    """
    o = options
    if o.name == "sgd":
        return sgd(
            learning_rate,
            momentum=o.momentum,
            nesterov=o.nesterov,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
            labels=labels,
            decay_mask=o.decay_mask,
        )
    decay = optax.add_decayed_weights(o.weight_decay, _mask(labels, o.decay_mask))
    if o.name == "lion":
        rule = [optax.scale_by_lion(o.beta1, o.beta2), decay]
    else:
        adam = optax.scale_by_adam(o.beta1, o.beta2, o.eps)
        rule = {
            "adam": [decay, adam],
            "adamw": [adam, decay],
            "lamb": [adam, decay, optax.scale_by_trust_ratio()],
        }[o.name]
    return optax.chain(
        _clip(o.clip_norm, labels), *rule, optax.scale_by_learning_rate(learning_rate)
    )


def sgd(
    learning_rate: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    clip_norm: float,
    labels: PyTree,
    decay_mask: bool = False,
) -> optax.GradientTransformation:
    """Returns SGD with gradient clipping per module, weight decay and momentum.

    The order is that of PyTorch's SGD, where the decay enters the momentum buffer. VAM
    gates are not decayed, since decay would pull them to uniform attention, against
    their entropy term; `decay_mask` leaves out more, see `decays`. Clipping takes one
    norm per module, as given by `labels` (the module index of every parameter): a norm
    over all modules would couple them across the cuts.
    """
    return optax.chain(
        _clip(clip_norm, labels),
        optax.add_decayed_weights(weight_decay, _mask(labels, decay_mask)),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def _clip(limit: float, labels: PyTree) -> optax.GradientTransformation:
    return clip_by_module_norm(limit, labels) if limit else optax.identity()


def _mask(labels: PyTree, masked: bool) -> Any:
    """Returns the mask of the decay as optax takes it: a function, a tree, or None."""
    if masked:  # depends on the number of axes, which labels do not have
        return lambda params: decays(params, masked=True)
    mask = decays(labels, masked=False)
    # A mask changes the structure of the optimiser's state, so there is none if it
    # would exclude nothing.
    return None if all(jax.tree.leaves(mask)) else mask


def decays(params: PyTree, *, masked: bool) -> PyTree:
    """Returns whether weight decay applies to each parameter.

    It never applies to the gates of virtual attention, nor to a classifier of another
    network, which has no gradient either and so stays as it is. With `masked`
    (`optim.decay_mask`) it does not apply to vectors and scalars either, such as
    biases, the scales of norms and layer scales, nor to position embeddings and tokens.
    """

    def applies(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [key.key for key in path]
        if vam.is_gate(names) or projector.is_borrowed(names):
            return False
        return not masked or (leaf.ndim > 1 and names[-1] not in _UNDECAYED)

    return jax.tree_util.tree_map_with_path(applies, params)


def decayed(params: PyTree, *, masked: bool = False) -> PyTree:
    """Returns `params` with zeros where weight decay does not apply, see `decays`."""
    # A product keeps NaN and infinity visible to the checks for non-finite values.
    return jax.tree.map(
        lambda p, kept: p if kept else 0.0 * p, params, decays(params, masked=masked)
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
