"""Batch norms folded into the convolutions before them, for inference.

At inference a batch norm is y = s x + t per channel, s = scale / sqrt(var + eps) and
t = bias - s mean. Behind a convolution, s goes into its kernel and t becomes its bias;
elsewhere (pre-activation networks) s and t stay as `layers.Affine`.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from lakd_jax import models
from lakd_jax.models import chain, layers

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
    """As `fold_batch_norm`, of a network that was made already."""
    params: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables["params"])
    stats: dict[_Path, Any] = flax.traverse_util.flatten_dict(variables["batch_stats"])
    for norm in {path[:-1] for path in stats}:
        params |= _folded(norm, params, stats)
    folded = model.clone(folded=True)
    wanted = _shapes(folded)
    kept = {path: params[path] for path in wanted if path in params}
    if {path: x.shape for path, x in kept.items()} != wanted:
        raise ValueError(f"the variables are not those of {type(model).__name__}")
    return folded, {"params": flax.traverse_util.unflatten_dict(kept)}


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
    """Path to shape of all parameters; the size of the images is of no matter."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    tree: Any = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )
    flat: dict[_Path, Any] = flax.traverse_util.flatten_dict(tree["params"])
    return {path: leaf.shape for path, leaf in flat.items()}
