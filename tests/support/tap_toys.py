"""Made-up taps and signals for the tests of the methods that compare taps."""

import jax
import numpy as np

from lakd_jax.distill.base import method
from lakd_jax.models import chain

TEACHER = ((8, 6), (8, 6), (4, 12), (2, 10))  # (side, channels)
STUDENT = ((8, 4), (4, 8), (4, 8))


def taps(shapes, seed, batch=5):
    """Non-negative noise, (batch, side, side, channels) each."""
    rng = np.random.default_rng(seed)
    return tuple(
        np.maximum(rng.standard_normal((batch, side, side, channels)), 0).astype("f4")
        for side, channels in shapes
    )


def outputs(tapped, seed=0, classes=4):
    batch = len(tapped[0]) if tapped else 5
    logits = np.random.default_rng(seed).standard_normal((batch, classes))
    return chain.Outputs(
        logits=logits.astype(np.float32),
        stem=None,
        features=(),
        preacts=(),
        blocks=(),
        pooled=np.zeros((batch, 1), np.float32),
        taps=tapped,
    )


def signals(student, teacher):
    """Signals with the taps given and fixed random logits."""
    ours, theirs = outputs(student, 1), outputs(teacher, 2)
    labels = np.arange(len(ours.logits), dtype=np.int32) % 4
    return method.Signals(
        student=ours,
        teacher=theirs,
        labels=labels,
        epoch=np.float32(0),
        student_joints=(np.zeros((len(labels), 1, 1, 1), np.float32),),
        teacher_joints=(),
    )


def variables(module, *args, seed=0):
    """Training-mode variables drawn by NumPy: XLA compiles random numbers slowly."""
    shapes = jax.eval_shape(
        lambda key: module.init(key, *args, train=True), jax.random.key(0)
    )
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if len(leaf.shape) < 2:
            value = path[-1].key in ("scale", "var")
            return np.full(leaf.shape, value, np.float32)
        noise = rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0])
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def largest(tree):
    """Largest absolute value of all leaves."""
    return max(float(np.max(np.abs(x))) for x in jax.tree.leaves(tree))
