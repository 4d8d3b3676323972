"""Every family is initialised as its authors, or PyTorch, initialise it."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax import models

QUICK = ["wrn_16_2", "vgg8", "mobilenet_v2", "resnet18", "shuffle_v1"]
FAMILIES = {
    "wrn_16_2": "he",
    "vgg8": "he",
    "mobilenet_v2": "he",
    "mobilenet_v2_imagenet": "he",
    "cifar_resnet18": "he",
    "resnet18": "he",
    "mobilenet_v1": "torch",
    "shuffle_v1": "torch",
    "shuffle_v2": "torch",
}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in FAMILIES],
)
def test_initialisation_is_the_family_s_own(name):
    """He's normal by the fan-out, or torch's uniform by the fan-in; both published."""
    model, spread = models.create(name, num_classes=100), FAMILIES[name]
    x = jnp.zeros((1, 4, 4, 24 if name.startswith("shuffle_v1") else 32))
    features = jnp.zeros((1, 2, 2, 256))

    @jax.jit
    def init(key):
        """Initialises a block and the head; XLA compiles rbg's generator quickly."""
        block = model.make_block(1, 0, None).init(key, x, train=False)
        return block, model.make_head(None).init(key, features, train=False)

    block, head = init(jax.random.key(2, impl="unsafe_rbg"))
    flat = flax.traverse_util.flatten_dict(block["params"])
    kernels = [k for path, k in flat.items() if path[-1] == "kernel"]
    kernel = max(kernels, key=lambda k: k.size)
    fan_out = kernel.shape[0] ** 2 * kernel.shape[-1]
    fan_in = kernel.size // kernel.shape[-1]
    expected = {"he": math.sqrt(2 / fan_out), "torch": math.sqrt(1 / 3 / fan_in)}
    assert jnp.std(kernel) == pytest.approx(expected[spread], rel=0.1)
    for path, leaf in flat.items():
        if path[-1] in ("scale", "bias"):
            np.testing.assert_array_equal(leaf, float(path[-1] == "scale"))
    dense = head["params"]["dense"]
    plain = spread == "torch" or "resnet" in name
    assert (jnp.max(jnp.abs(dense["bias"])) > 0) == plain
    if name.startswith(("vgg", "mobilenet_v2")):
        assert jnp.std(dense["kernel"]) == pytest.approx(0.01, rel=0.05)
