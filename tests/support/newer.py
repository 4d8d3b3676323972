"""Golden values of `newer.npz`: losses of methods that were published later.

Of the gradients to maps it has the first two of eight examples and the norm of all.
"""

import golden_weights
import numpy as np

INPUTS = golden_weights.arrays("losses_inputs")
GOLDEN = golden_weights.arrays("newer")
LABELS = INPUTS["labels"].astype(np.int32)
# Relative, five times what lies between the public code's float32 and its float64.
CLOSE = 1e-5


def feature(name):
    """An input map, of either file."""
    return INPUTS.get(name, GOLDEN.get(f"inputs/{name}"))


def assert_public(key, value, grad):
    """Asserts that a value and its gradient to the student are the public ones."""
    assert value.dtype == np.float32 and value.shape == ()
    np.testing.assert_allclose(value, GOLDEN[key], rtol=CLOSE)
    assert_public_grad(f"{key}/grad_s", grad)


def assert_public_grad(key, grad):
    """Asserts that a gradient is the public one."""
    norm = GOLDEN.get(f"{key}/norm")
    if norm is not None:
        np.testing.assert_allclose(np.linalg.norm(grad), norm, rtol=CLOSE)
        grad = grad[:2]
    assert golden_weights.distance(grad, GOLDEN[key]) < CLOSE


def norm_state(name, width):
    """Running statistics of the batch norm `name`."""
    kinds = {"mean": "running_mean", "var": "running_var"}
    return {k: golden_weights.tensor(f"{name}.{v}", (width,)) for k, v in kinds.items()}


def as_torch(kernel):
    """HWIO as PyTorch has it, with the axes that `golden_weights.nhwc` moves."""
    return golden_weights.nhwc(np.transpose(kernel, (3, 2, 0, 1)))


def teacher_head():
    """Matrix (96, 10) and bias of the teacher's classifier."""
    matrix = golden_weights.tensor("teacher_head.weight", (10, 96)).T
    return matrix, golden_weights.tensor("teacher_head.bias", (10,))
