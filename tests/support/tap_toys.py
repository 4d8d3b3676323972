"""Made-up taps and signals for the tests of the methods that compare taps."""

import jax
import numpy as np
import toys

TEACHER = ((8, 6), (8, 6), (4, 12), (2, 10))  # (side, channels)
STUDENT = ((8, 4), (4, 8), (4, 8))


def taps(shapes, seed, batch=5):
    """Non-negative noise, (batch, side, side, channels) each."""
    rng = np.random.default_rng(seed)
    return tuple(
        np.maximum(rng.standard_normal((batch, side, side, channels)), 0).astype("f4")
        for side, channels in shapes
    )


def signals(student, teacher):
    """Signals with the taps given and fixed random logits."""
    batch, classes = len(student[0]), 4
    ours, theirs = (
        toys.outputs(toys.noise(seed, batch, classes), taps=tapped)
        for seed, tapped in ((1, student), (2, teacher))
    )
    return toys.signals(ours, theirs, np.arange(batch) % classes)


def variables(module, *args, seed=0):
    """Training-mode variables drawn by NumPy."""
    shapes = jax.eval_shape(
        lambda key: module.init(key, *args, train=True), jax.random.key(0)
    )
    return toys.drawn(shapes, seed)


def largest(tree):
    """Largest absolute value of all leaves."""
    return max(float(np.max(np.abs(x))) for x in jax.tree.leaves(tree))
