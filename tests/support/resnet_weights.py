"""Made-up PyTorch weights of small ResNets, and how to compare variables."""

import functools

import golden_weights
import jax
import numpy as np

COUNTER = "num_batches_tracked"


@functools.cache
def torch_weights(name="resnet8", shortcut="projection", classes=7):
    """A made-up state_dict of any three-stage ResNet, from the published layout."""
    widths = (32, 64, 128, 256) if name.endswith("x4") else (16, 16, 32, 64)
    size = (int(name.removeprefix("resnet").removesuffix("x4")) - 2) // 6
    shapes = {"conv1.weight": (widths[0], 3, 3, 3)} | norm("bn1", widths[0])
    for stage in (1, 2, 3):
        for index in range(size):
            block = f"layer{stage}.{index}"
            old, new = widths[stage - (index == 0)], widths[stage]
            shapes[f"{block}.conv1.weight"] = (new, old, 3, 3)
            shapes[f"{block}.conv2.weight"] = (new, new, 3, 3)
            shapes |= norm(f"{block}.bn1", new) | norm(f"{block}.bn2", new)
            if old != new and shortcut == "projection":
                shapes[f"{block}.downsample.0.weight"] = (new, old, 1, 1)
                shapes |= norm(f"{block}.downsample.1", new)
    shapes |= {"fc.weight": (classes, widths[3]), "fc.bias": (classes,)}
    return {key: golden_weights.tensor(key, shape) for key, shape in shapes.items()}


def norm(prefix, width):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{part}": (width,) for part in parts}


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
