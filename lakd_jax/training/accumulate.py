"""Computes the gradient of a batch in several parts, so that activations take less.

A micro-batch has every n-th example, so that each device keeps those that it has.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax.runtime import backend
from lakd_jax.training import dot, segments, teacher_outputs
from lakd_jax.training import spec as spec_lib

PyTree = Any
# Of a micro-batch: the gradient, the collections after it, the boundary above, metrics.
Learned = tuple[PyTree, PyTree, segments.Boundary, segments.Metrics]
Learn = Callable[
    [PyTree, teacher_outputs.Source, segments.Boundary, segments.Batch], Learned
]


def in_parts(spec: spec_lib.StepSpec, learn: Learn, params: PyTree) -> Learn:
    """Returns a function like `learn` that takes a batch in `spec.accumulate` parts.

    Gradients and metrics are means over the parts, which are equally large. Collections
    pass from one part to the next, so batch statistics are those of the parts, and the
    running ones move once for each. Every part has a random key of its own. Losses that
    compare the examples of a batch compare those of a part.

    Args:
      spec: the step's constants.
      learn: takes collections, the teacher's variables or outputs, boundary and batch.
      params: the parameters that it differentiates by.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    if spec.momenta:
        zeros = dot.split(spec.momenta, [zeros for _ in spec.momenta])
    return functools.partial(_learn, spec, learn, zeros)


def _learn(
    spec: spec_lib.StepSpec,
    learn: Learn,
    zeros: PyTree,
    collections: PyTree,
    source: teacher_outputs.Source,
    below: segments.Boundary,
    batch: segments.Batch,
) -> Learned:
    count = spec.accumulate
    stored = isinstance(source, teacher_outputs.TeacherOutputs)
    labels = (batch.labels, batch.soft_labels)
    whole = (source if stored else None, below, labels, batch.examples)
    parts = jax.tree.map(lambda x: _split(spec, x), whole)

    def body(carry: tuple[PyTree, PyTree], inputs: Any) -> tuple[Any, Any]:
        total, collections = carry
        (outputs, below, labels, examples), i = inputs
        if backend.on_cpu(spec.mesh):
            below = _after(total, below)
        noise = jax.random.fold_in(batch.noise, i)
        part = segments.Batch(labels[0], examples, noise, labels[1])
        grads, collections, above, metrics = learn(
            collections, outputs if stored else source, below, part
        )
        total = jax.tree.map(jnp.add, total, grads)
        return (total, collections), (above, metrics)

    # Unrolled on CPU for the reason that `step.run_steps` gives.
    (total, collections), (above, metrics) = jax.lax.scan(
        body,
        (zeros, collections),
        (parts, jnp.arange(count)),
        unroll=count if backend.on_cpu(spec.mesh) else 1,
    )
    grads = jax.tree.map(lambda g: g / count, total)
    above = jax.tree.map(lambda x: _joined(spec, x), above)
    return grads, collections, above, jax.tree.map(lambda m: jnp.mean(m, 0), metrics)


def _split(spec: spec_lib.StepSpec, x: jax.Array) -> jax.Array:
    """Returns (n, B / n, ...) from (B, ...): part i has the examples i, i + n, ..."""
    parts = jnp.moveaxis(x.reshape(-1, spec.accumulate, *x.shape[1:]), 1, 0)
    return spec_lib.shared(spec, parts, axis=1)


def _joined(spec: spec_lib.StepSpec, parts: jax.Array) -> jax.Array:
    """Inverts `_split`."""
    x = jnp.moveaxis(parts, 0, 1)
    return spec_lib.shared(spec, x.reshape(-1, *x.shape[2:]))


def _after(total: PyTree, below: segments.Boundary) -> segments.Boundary:
    """Returns `below`, but makes its uses wait for all gradients in `total`.

    Without this, XLA runs the forward passes of all parts first, on CPU, and keeps all
    activations; a dependency on one number of each array is enough. Infinite ones are
    left out, so that an overflow cannot spread this way.
    """
    one = jnp.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(total)]).sum()
    zero = 0 * jnp.where(jnp.isfinite(one), one, 1.0)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), below)
