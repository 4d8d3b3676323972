"""Measures knowledge conflict: whether classes pull shared weights apart.

Our interpretation of KDExplainer's term: the cosine between the gradients of different
classes' losses with respect to the same weights. Below 0, learning one class undoes
another; the paper claims that distillation reduces this.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lakd_jax.models import chain

PyTree = Any


def mean_cosines(
    model: chain.Chain,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    classes: np.ndarray,
) -> dict[str, float]:
    """Computes the mean cosine between class-wise loss gradients, part by part.

    The loss of a class is the cross-entropy over its images, with running batch
    statistics, so that images of one class do not affect the normalisation of another.

    Args:
        model: the network, with unfolded batch norms.
        variables: its parameters and statistics.
        images: (n, H, W, 3), normalised.
        labels: (n,) integers.
        classes: the labels to compare, two or more, each with images.

    Returns:
        Top-level part ("stem", "stage1", ...) -> mean over pairs of classes, in
        [-1, 1]; a class whose gradient there is zero counts as 0.

    Raises:
        ValueError: fewer than two classes, or one without images.
    """
    if len(classes) < 2 or not all(np.any(labels == c) for c in classes):
        raise ValueError("conflict needs two or more classes, each with images")

    @jax.jit
    def gradient(params: PyTree, chosen: jax.Array) -> PyTree:
        def loss(params: PyTree) -> jax.Array:
            outputs: Any = model.apply(
                {**variables, "params": params}, images, train=False
            )
            return _masked_cross_entropy(outputs.logits, labels, chosen)

        return jax.grad(loss)(params)

    per_class = [
        gradient(variables["params"], jnp.asarray(labels == c)) for c in classes
    ]
    # The head is excluded: each of its rows belongs to a single class.
    parts = dict.fromkeys(name.split(".")[0] for name in model.unit_names)
    return {
        part: _mean_cosine([_flat(tree[part]) for tree in per_class])
        for part in parts
        if part in variables["params"]
    }


def _masked_cross_entropy(
    logits: jax.Array, labels: np.ndarray, chosen: jax.Array
) -> jax.Array:
    """Computes the mean over the images selected by the mask `chosen` (n,)."""
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    weights = chosen.astype(jnp.float32)
    return jnp.sum(each * weights) / jnp.sum(weights)


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _mean_cosine(gradients: list[np.ndarray]) -> float:
    """Averages over all pairs: (|sum of unit vectors|^2 - n) / (n (n - 1))."""
    norms = [np.linalg.norm(g) for g in gradients]
    units = [g / n if n > 0 else g for g, n in zip(gradients, norms, strict=True)]
    nonzero = sum(n > 0 for n in norms)
    count = len(units)
    return float((np.linalg.norm(sum(units)) ** 2 - nonzero) / (count * (count - 1)))
