"""The depthwise convolution of training on CPU is XLA's, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax import models
from lakd_jax.models import chain, depthwise, layers

STYLE = layers.Style()


def applied(train, side, channels):
    """Returns (x, variables) -> the convolution, and these two."""
    x = np.random.default_rng(0).standard_normal((2, 6, 5, channels))
    module = layers.conv(channels, side, 1, STYLE, name="c", groups=channels)
    variables = module.init(jax.random.key(0), jnp.float32(x))
    options = {"groups": channels, "name": "c", "train": train}
    module = layers.conv(channels, side, 1, STYLE, **options)
    assert (module.conv_general_dilated is not None) == (train and side >= 5)
    return module.apply, variables, jnp.float32(x)


@pytest.mark.parametrize("side", [5, 7])
def test_values_and_gradients_are_those_of_the_convolution(side):
    found = []
    for train in (True, False):
        apply, variables, x = applied(train, side, 4)

        def loss(variables, x, apply=apply):
            return jnp.sum(jnp.sin(apply(variables, x)))

        found.append((apply(variables, x), jax.grad(loss, (0, 1))(variables, x)))
    for ours, expected in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_small_kernels_keep_the_convolution():
    applied(True, 3, 4)


def test_other_convolutions_are_refused():
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((5, 5, 1, 4))
    pads, one = ((2, 2), (2, 2)), {"feature_group_count": 4}
    assert depthwise.convolve(x, kernel, (1, 1), pads, **one).shape == x.shape
    for strides, padding, groups in (
        ((2, 2), pads, 4),
        ((1, 1), ((0, 0), (0, 0)), 4),
        ((1, 1), pads, 2),
    ):
        with pytest.raises(ValueError, match="stride 1, padded evenly"):
            depthwise.convolve(x, kernel, strides, padding, feature_group_count=groups)


def test_what_is_exported_has_the_convolution():
    """In evaluation: the program is for other machines, too."""
    model = models.create("convnext_atto", num_classes=3, patch=4)
    model = model.clone(stage_sizes=(1, 1, 1, 1))
    variables = toys.drawn(chain.variable_shapes(model), 1)
    images = jnp.zeros((1, 32, 32, 3))
    texts = [
        jax.jit(functools.partial(model.apply, train=train))
        .lower(variables, images)
        .as_text()
        for train in (True, False)
    ]
    counts = [text.count("stablehlo.convolution") for text in texts]
    assert counts[1] == 1 + 3 + 4 and counts[0] == counts[1] - 4
