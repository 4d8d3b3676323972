"""Folds batch norms and virtual attention into convolutions, for inference.

At inference a batch norm is y = s x + t per channel, s = scale / sqrt(var + eps) and
t = bias - s mean. After a convolution, s is multiplied into the kernel and t becomes
the bias; elsewhere (pre-activation networks) s and t remain as `layers.Affine`. Static
gates of `models.vam` scale kernels, whether or not a norm follows.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from lakd_jax.models import chain, layers, vam

PyTree = Any
_Path = tuple[str, ...]


def fold(model: chain.Chain, variables: PyTree) -> tuple[chain.Chain, PyTree]:
    """Returns the network without batch norms: equal logits, fewer operations.

    Static gates are folded as well; a network with dynamic gates keeps them.

    Args:
        model: the network.
        variables: of that network, {"params": ..., "batch_stats": ...}.

    Returns:
        The network and its variables, {"params": ...} in float32.

    Raises:
        ValueError: the variables are those of another network.
    """
    if model.vam is not None and model.vam.foldable:
        model, variables = fold_gates(model, variables)
    params: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables["params"])
    stats: dict[_Path, Any] = flax.traverse_util.flatten_dict(
        variables.get("batch_stats", {})
    )
    for norm in {path[:-1] for path in stats}:
        params |= _folded(norm, params, stats)
    folded = model.clone(folded=True)
    shapes = _shapes(folded)
    if unused := [path for path in params if vam.is_gate(path) and path not in shapes]:
        raise ValueError(
            f"the variables have gates, such as {'/'.join(unused[0])}, which "
            f"{type(model).__name__} does not have: make it with the same `vam`"
        )
    kept = {path: params[path] for path in shapes if path in params}
    if {path: x.shape for path, x in kept.items()} != shapes:
        raise ValueError(f"the variables are not those of {type(model).__name__}")
    return folded, {"params": flax.traverse_util.unflatten_dict(kept)}


def fold_gates(model: chain.Chain, variables: PyTree) -> tuple[chain.Chain, PyTree]:
    """Returns the plain network that computes the same as one with static gates.

    Args:
        model: with or without `vam`; without it, nothing changes.
        variables: of that network, {"params": ...} and its other collections.

    Returns:
        The network without `vam`, and its variables: those given, with W' for every
        kernel W that has a gate.

    Raises:
        ValueError: the gates are dynamic, so their attention differs between images.
    """
    if model.vam is None:
        return model, variables
    if not model.vam.foldable:
        raise ValueError(
            "dynamic gates depend on the image and cannot be folded into the kernels; "
            "train with static gates to get a plain network"
        )
    flat: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables["params"])
    for path, gate in list(flat.items()):
        if vam.is_gate(path):
            kernel = (*path[:-1], "kernel")
            flat[kernel] = vam.scaled_kernel(flat[kernel], model.vam.scale(gate))
    params = flax.traverse_util.unflatten_dict(flat)
    return model.clone(vam=None), without_gates({**variables, "params": params})


def without_gates(variables: PyTree) -> PyTree:
    """Drops VAM's gates from variables, which leaves those of the plain network."""
    flat: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables)
    kept = {path: x for path, x in flat.items() if not vam.is_gate(path)}
    return flax.traverse_util.unflatten_dict(kept)


def _folded(
    norm: _Path, params: dict[_Path, jax.Array], stats: dict[_Path, jax.Array]
) -> dict[_Path, jax.Array]:
    """Returns the arrays that replace one batch norm and its convolution."""
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
    """Returns the shape of every parameter by path."""
    params = chain.variable_shapes(model)["params"]
    flat: dict[_Path, Any] = flax.traverse_util.flatten_dict(params)
    return {path: leaf.shape for path, leaf in flat.items()}
