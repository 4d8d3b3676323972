"""The classifier of a network, in another order or removed."""

import functools

import flax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lakd_jax import models
from lakd_jax.models import heads

ORDER = [2, 0, 3, 1]
NETWORKS = {
    "dense": tiny.SMALL,
    "entry norm": functools.partial(models.create, "wrn_10_1"),
    "hme": functools.partial(models.create, "hme", layout="ltb"),
    "hme with norms": functools.partial(
        models.create, "hme", layout="split", base="wrn_10_1"
    ),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_logits_follow_the_order_of_the_classes(make):
    """Each family's head, found by its shapes."""
    model = make(num_classes=4)
    variables = tiny.variables(model)
    rng = np.random.default_rng(0)
    for path, x in (flat := flax.traverse_util.flatten_dict(variables)).items():
        if path[1] == "head":  # so that no two classes share statistics or biases
            flat[path] = x + rng.uniform(0, 1, x.shape).astype("f4")
    variables = flax.traverse_util.unflatten_dict(flat)
    images = jnp.asarray(rng.uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
    before, after = (
        np.asarray(model.apply(v, images, train=False).logits)
        for v in (variables, heads.reordered(model, variables, ORDER))
    )
    assert len(np.unique(before[0].round(4))) == 4
    np.testing.assert_allclose(after, before[:, ORDER], atol=1e-5)


def test_what_is_removed_depends_on_the_classes_alone():
    """The 1x1 convolution in MobileNet's head stays."""
    model = models.create("mobilenet_v2", num_classes=4)
    axes = heads.class_axes(model)
    assert axes == {
        ("params", "head", "dense", "kernel"): (1,),
        ("params", "head", "dense", "bias"): (0,),
    }
    kept = heads.removed(model, tiny.variables(model))
    assert set(kept["params"]["head"]) == {"conv", "bn"}
