"""Made-up taps and signals for the tests of the methods that compare taps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax.distill import method
from lakd_jax.models import chain

TEACHER = ((8, 6), (8, 6), (4, 12), (2, 10))  # (side, channels)
STUDENT = ((8, 4), (4, 8), (4, 8))


def taps(shapes, seed, batch=5):
    """Non-negative noise, (batch, side, side, channels) each."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(
        jax.nn.relu(jax.random.normal(key, (batch, side, side, channels)))
        for key, (side, channels) in zip(keys, shapes, strict=True)
    )


def outputs(tapped, seed=0, classes=4):
    batch = len(tapped[0]) if tapped else 5
    logits = jax.random.normal(jax.random.key(seed), (batch, classes))
    return chain.Outputs(
        logits=logits,
        stem=None,
        features=(),
        preacts=(),
        blocks=(),
        pooled=jnp.zeros((batch, 1)),
        taps=tapped,
    )


def signals(student, teacher):
    """Signals with the taps given and fixed random logits."""
    ours, theirs = outputs(student, 1), outputs(teacher, 2)
    labels = jnp.arange(len(ours.logits)) % 4
    return method.Signals(
        student=ours,
        teacher=theirs,
        labels=labels,
        epoch=jnp.float32(0),
        student_joints=(jnp.zeros((len(labels), 1, 1, 1)),),
        teacher_joints=(),
    )


def variables(module, *args, seed=0):
    """Training-mode variables drawn by NumPy: XLA compiles random numbers slowly."""
    init = functools.partial(module.init, train=True)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if len(leaf.shape) < 2:
            return jnp.full(leaf.shape, float(path[-1].key in ("scale", "var")))
        noise = rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0])
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def largest(tree):
    """Largest absolute value of all leaves."""
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))
