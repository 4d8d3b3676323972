"""Batch norms and virtual attention folded into convolutions, for inference.

At inference a batch norm is y = s x + t per channel, s = scale / sqrt(var + eps) and
t = bias - s mean. Behind a convolution, s goes into its kernel and t becomes its bias;
elsewhere (pre-activation networks) s and t stay as `layers.Affine`. Static gates of
`models.vam` scale kernels, whatever stands behind them.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from lakd_jax import models
from lakd_jax.models import chain, layers, vam

PyTree = Any
_Path = tuple[str, ...]


def fold_batch_norm(
    name: str, variables: PyTree, *, dtype: Any = jnp.float32
) -> tuple[chain.Chain, PyTree]:
    """The network `name` without batch norms: the same logits in fewer operations.

    Args:
        name: one of `models.names()`.
        variables: of that network, {"params": ..., "batch_stats": ...}.
        dtype: what the folded network computes in.

    Returns:
        The network and its variables, {"params": ...} in float32.

    Raises:
        ValueError: unknown name, or the variables are another network's.
    """
    options = models.family(name).options_from_variables(variables)
    return fold(models.create(name, dtype=dtype, **options), variables)


def fold(model: chain.Chain, variables: PyTree) -> tuple[chain.Chain, PyTree]:
    """As `fold_batch_norm`, of a network that was made already.

    Static gates are folded as well; dynamic ones stay, and the network with them.
    """
    if model.vam is not None and model.vam.foldable:
        model, variables = fold_gates(model, variables)
    params: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables["params"])
    stats: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables["batch_stats"])
    for norm in {path[:-1] for path in stats}:
        params |= _folded(norm, params, stats)
    folded = model.clone(folded=True)
    wanted = _shapes(folded)
    if lost := [path for path in params if vam.is_gate(path) and path not in wanted]:
        raise ValueError(
            f"the variables have gates, such as {'/'.join(lost[0])}, which the "
            f"{type(model).__name__} has not: make it with the same `vam`"
        )
    kept = {path: params[path] for path in wanted if path in params}
    if {path: x.shape for path, x in kept.items()} != wanted:
        raise ValueError(f"the variables are not those of {type(model).__name__}")
    return folded, {"params": flax.traverse_util.unflatten_dict(kept)}


def fold_gates(model: chain.Chain, variables: PyTree) -> tuple[chain.Chain, PyTree]:
    """The plain network that computes what one with static gates does.

    Args:
        model: with or without `vam`; without, nothing is changed.
        variables: of that network, {"params": ...} and what else it has.

    Returns:
        The network without `vam`, and its variables: those given, with W' for every
        kernel W that has a gate.

    Raises:
        ValueError: the gates are dynamic: their attention differs between images.
    """
    if model.vam is None:
        return model, variables
    if not model.vam.foldable:
        raise ValueError(
            "dynamic gates depend on the image and cannot be folded into the kernels; "
            "train with static ones to get a plain network"
        )
    flat: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables["params"])
    for path, gate in list(flat.items()):
        if vam.is_gate(path):
            kernel = (*path[:-1], "kernel")
            flat[kernel] = model.vam.kernel(flat[kernel], gate)
    params = flax.traverse_util.unflatten_dict(flat)
    return model.clone(vam=None), without_gates({**variables, "params": params})


def without_gates(variables: PyTree) -> PyTree:
    """The same variables without VAM's gates; those left are a plain network's."""
    flat: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables)
    kept = {path: x for path, x in flat.items() if not vam.is_gate(path)}
    return flax.traverse_util.unflatten_dict(kept)


def _folded(
    norm: _Path, params: dict[_Path, jax.Array], stats: dict[_Path, jax.Array]
) -> dict[_Path, jax.Array]:
    """The arrays that take the place of one batch norm and of what it follows."""
    variance, mean = stats[*norm, "var"], stats[*norm, "mean"]
    scale = params[*norm, "scale"] / jnp.sqrt(variance + layers.EPSILON)
    shift = params[*norm, "bias"] - scale * mean
    conv = (*norm[:-1], norm[-1].replace("bn", "conv"))  # see layers.conv_norm
    if (*conv, "kernel") not in params:
        return {(*norm, "scale"): scale, (*norm, "bias"): shift}
    bias = params.get((*conv, "bias"), 0.0)
    kernel = params[*conv, "kernel"] * scale[None, None, None, :]  # HWIO
    return {(*conv, "kernel"): kernel, (*conv, "bias"): shift + scale * bias}


def _shapes(model: chain.Chain) -> dict[_Path, tuple[int, ...]]:
    """Path to shape of all parameters."""
    params = chain.variable_shapes(model)["params"]
    flat: dict[_Path, Any] = flax.traverse_util.flatten_dict(params)
    return {path: leaf.shape for path, leaf in flat.items()}
