"""Folding of batch norms, by hand (parity is in test_models_golden)."""

import functools

import flax
import jax
import numpy as np
import pytest
import tiny

from lakd_jax import models
from lakd_jax.models import folding


def network(shortcut="projection"):
    model = models.create("resnet8", num_classes=5, shortcut=shortcut)
    return model, tiny.variables(model)


def run(model, variables):
    images = np.random.default_rng(3).standard_normal((4, 8, 8, 3)).astype("float32")
    return jax.jit(functools.partial(model.apply, train=False))(variables, images)


def test_folding_by_hand():
    """y = scale (conv - mean) / sqrt(var + 1e-5) + bias with a = 1x1 kernel."""
    model, variables = network()
    flat = flax.traverse_util.flatten_dict(variables)
    norm = ("stem", "bn")
    flat["params", *norm, "scale"] = np.full(16, 3.0)
    flat["params", *norm, "bias"] = np.full(16, 0.5)
    flat["batch_stats", *norm, "mean"] = np.full(16, 2.0)
    flat["batch_stats", *norm, "var"] = np.full(16, 4.0 - 1e-5)
    variables = flax.traverse_util.unflatten_dict(flat)
    folded_model, folded = folding.fold_batch_norm("resnet8", variables)
    stem = folded["params"]["stem"]["conv"]
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_allclose(stem["kernel"], 1.5 * kernel, rtol=1e-6)
    np.testing.assert_allclose(stem["bias"], np.full(16, 0.5 - 1.5 * 2.0), rtol=1e-6)
    assert folded_model.folded
    assert folded_model.num_classes == 5
    out = run(folded_model, folded)
    expected = run(model, variables)
    np.testing.assert_allclose(out.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_folding_keeps_the_shortcut_and_refuses_other_networks():
    _, variables = network(shortcut="identity")
    model, _ = folding.fold_batch_norm("resnet8", variables)
    assert model.shortcut == "identity"
    with pytest.raises(ValueError, match="not those of ResNet"):
        folding.fold_batch_norm("resnet14", variables)
    with pytest.raises(ValueError, match="params/head/dense/kernel"):
        folding.fold_batch_norm("resnet8", {"params": {}})
    with pytest.raises(ValueError, match="did you mean 'resnet8'"):
        folding.fold_batch_norm("resnet9", variables)
