"""Made-up taps and signals for the tests of the methods that compare taps."""

import jax
import jax.numpy as jnp

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


def largest(tree):
    """Largest absolute value of all leaves."""
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))
