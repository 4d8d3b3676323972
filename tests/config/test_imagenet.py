"""The ImageNet recipe: that its fields go together, and its learning rate."""

import runpy

import pytest

from lakd_jax import config as config_lib
from lakd_jax.config import check
from lakd_jax.training import phase

CONFIG = "configs/imagenet_lakd.py"
STEPS = 2503  # 1,281,167 images in batches of 512


def recipe(arg="", **fields):
    config = runpy.run_path(CONFIG)["get_config"](arg)
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    return config_lib.changed(config, changes)


@pytest.mark.parametrize(
    "arg",
    [
        "",
        "resnet50,mobilenet_v1,lakd",
        "resnet34,resnet18,kd",
        "resnet34,resnet18,dkd+at",
        "resnet50,resnet18,none",
        "wrn_40_2,vgg8,kd",  # any pair
    ],
)
def test_pairs_and_methods_go_with_it(arg):
    assert check.problems(recipe(arg), 8) == []


def test_the_rate_falls_after_30_60_and_90_epochs():
    rate = phase.Phase(recipe()).learning_rate(STEPS)
    told = [float(rate(epoch * STEPS)) for epoch in (0, 29, 31, 61, 91)]
    assert told == pytest.approx([0.2, 0.2, 0.02, 0.002, 0.0002])


def test_the_rate_is_in_proportion_to_the_batch():
    for batch, first in ((512, 0.2), (256, 0.1), (2048, 0.8)):
        assert phase.Phase(recipe(batch_size=batch)).learning_rate(1)(
            0
        ) == pytest.approx(first)


def test_what_depends_on_the_pair():
    assert recipe().dkd.beta == 0.5
    assert recipe("resnet50,mobilenet_v1,dkd").dkd.beta == 2.0
