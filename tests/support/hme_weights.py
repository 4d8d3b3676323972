"""Made-up weights for HME, and those of the golden files in our tree."""

import functools
import json

import flax
import golden_weights
import jax
import numpy as np

from lakd_jax import models
from lakd_jax.models import chain

FOLDER = golden_weights.FOLDER / "hme"


def golden(output):
    """(variables, images (B, 32, 32, 3), what the reference computed)."""
    case = json.loads((FOLDER / f"{output}.json").read_text())
    weights = {
        key: golden_weights.tensor(case["prefix"] + key, tuple(shape))
        for key, shape in case["state_dict"]
    }
    with np.load(FOLDER / f"{output}.npz") as file:
        recorded = dict(file)
    images = recorded.pop("x").transpose(0, 2, 3, 1)
    return variables_of(weights), images, recorded


def variables_of(weights):
    """The reference's state dictionary as our variables."""
    classes = len(weights["branch_4.0"])
    leaves = {}
    for level, experts in ((1, 2), (2, 4), (3, 8)):
        unit = ("params", f"stage{level}", "block1")
        for i in range(experts):
            theirs, ours = f"conv{level + 1}_{i}", f"expert{i + 1}"
            _expert(leaves, weights, theirs, (f"stage{level}", "block1", ours))
        if level > 1:
            leaves[(*unit, "gate", "logits")] = weights[f"branch_{level}.0"]
    leaves["params", "head", "gate", "logits"] = weights["branch_4.0"]
    for ours, theirs in (("fc1", "fc1_{}.0"), ("fc2", "fc2_{}.0"), ("fc3", "fc2_{}.3")):
        for kind, name in (("weight", "kernel"), ("bias", "bias")):
            each = [weights[f"{theirs.format(k)}.{kind}"].T for k in range(classes)]
            leaves["params", "head", ours, name] = np.stack(each)
    return flax.traverse_util.unflatten_dict(leaves)


def _expert(leaves, weights, theirs, path):
    for index, layer in ((1, 0), (2, 3)):
        conv, norm = f"{theirs}.{layer}", f"{theirs}.{layer + 1}"
        kernel = weights[f"{conv}.weight"].transpose(2, 3, 1, 0)
        leaves["params", *path, f"conv{index}", "kernel"] = kernel
        leaves["params", *path, f"conv{index}", "bias"] = weights[f"{conv}.bias"]
        leaves["params", *path, f"bn{index}", "scale"] = weights[f"{norm}.weight"]
        leaves["params", *path, f"bn{index}", "bias"] = weights[f"{norm}.bias"]
        for kind in ("mean", "var"):
            value = weights[f"{norm}.running_{kind}"]
            leaves["batch_stats", *path, f"bn{index}", kind] = value


@functools.cache
def drawn(model):
    """Variables drawn by NumPy, large enough that every part shows in the logits."""
    rng = np.random.default_rng(4)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if name == "logits":
            return rng.random(leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[-4:-1]) if leaf.ndim > 2 else 100
        noise = rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, chain.variable_shapes(model))


def small(output="ce", **options):
    """The released layout for three classes, on images of any size."""
    return models.create("hme", num_classes=3, output=output, **options)
