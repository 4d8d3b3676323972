"""The field's recipe: steps, rates at given steps, what depends on the pair."""

import importlib.util
import pathlib

import numpy as np
import pytest

from lakd_jax import config as config_lib
from lakd_jax.config import check, recipes, resolved
from lakd_jax.data import order
from lakd_jax.training import phase

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 782
STATISTICS = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def config(data, arg=""):
    path = ROOT / "configs" / f"{data}.py"
    spec = importlib.util.spec_from_file_location(f"config_{data}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("data", STATISTICS)
def test_protocol_is_the_fields(data):
    c = config(data, "resnet56,resnet20,kd")
    assert (c.data.source, c.method) == (data, "kd")
    assert (c.data.mean, c.data.std) == STATISTICS[data]
    assert (c.data.pad, c.data.flip, c.data.minival) == (4, True, 0.0)
    assert (c.epochs, c.batch_size) == (240, 64)
    assert order.steps_per_epoch(50_000, c.batch_size, c.data.drop_last) == STEPS
    last = order.batch_indices(0, STEPS - 1, 50_000, c.batch_size, c.data.drop_last)
    assert len(last) == 50_000 - 64 * (STEPS - 1) == 16
    o = c.optim
    assert (o.momentum, o.nesterov, o.weight_decay) == (0.9, False, 5e-4)
    assert (o.warmup_epochs, o.clip_norm) == (0.0, 0.0)
    assert (c.kd.ce_weight, c.kd.kd_weight, c.kd.temperature) == (0.1, 0.9, 4.0)
    assert check.problems(c, 1) == []


def published_rate(lr, epoch):
    """That of the public trainer; its epochs are counted from 1."""
    return lr * 0.1 ** sum(epoch > stage for stage in (150, 180, 210))


@pytest.mark.parametrize(
    ("student", "lr"),
    [
        ("resnet20", 0.05),
        ("vgg8", 0.05),
        ("wrn_16_2", 0.05),
        ("mobilenet_v2", 0.01),
        ("shuffle_v1", 0.01),
        ("shuffle_v2", 0.01),
    ],
)
def test_rate_falls_in_the_step_in_which_the_public_one_does(student, lr):
    c = config("cifar100", f"resnet32x4,{student},kd")
    schedule = phase.Phase(c).learning_rate(STEPS)
    for epoch in (1, 149, 150, 151, 180, 181, 210, 211, 240):
        wanted = published_rate(lr, epoch)
        first, last = (epoch - 1) * STEPS, epoch * STEPS - 1
        got = [schedule(first), schedule(last)]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, err_msg=str(epoch))


@pytest.mark.parametrize(
    ("pair", "beta"),
    [
        ("resnet56,resnet20", 2.0),
        ("resnet110,resnet32", 2.0),
        ("resnet32x4,resnet8x4", 8.0),
        ("wrn_40_2,wrn_16_2", 6.0),
        ("wrn_40_2,wrn_40_1", 6.0),
        ("wrn_40_2,shuffle_v1", 8.0),
        ("vgg13,vgg8", 6.0),
        ("vgg13,mobilenet_v2", 6.0),
        ("cifar_resnet50,mobilenet_v2", 8.0),
        ("resnet32x4,shuffle_v2", 8.0),
    ],
)
def test_beta_of_dkd_is_the_pairs(pair, beta):
    assert config("cifar100", f"{pair},dkd").dkd.beta == beta


def test_weight_of_review_is_the_pairs():
    assert recipes.of_pair("resnet32x4", "resnet8x4")["review.weight"] == 5.0
    assert "review.weight" not in recipes.of_pair("resnet56", "resnet20")


def test_teacher_of_a_mobile_student_is_that_of_any_other():
    slow, fast = (
        resolved.of_teacher(
            resolved.resolve(config("cifar100", f"resnet32x4,{student},kd"))
        )
        for student in ("shuffle_v2", "resnet8x4")
    )
    assert slow.optim.lr == fast.optim.lr == 0.05
    assert slow.digest() == fast.digest()
    mobile = config("cifar100", "mobilenet_v2,resnet20,kd")
    assert resolved.of_teacher(resolved.resolve(mobile)).optim.lr == 0.01
    plain = config_lib.changed(config_lib.default(), {"optim.lr": 0.3})
    assert resolved.of_teacher(resolved.resolve(plain)).optim.lr == 0.3


def test_shorter_training_keeps_its_proportions():
    c = config("cifar100", "resnet56,resnet20,dkd")
    fields = recipes.shortened(c, 24)
    assert fields["epochs"] == 24
    np.testing.assert_allclose(fields["optim.milestones"], (15, 18, 21))
    assert fields["dkd.warmup_epochs"] == 2.0
    assert "at.warmup_epochs" not in fields  # 0 stays 0
    assert recipes.shortened(c, 240) == {}
    warm = config_lib.changed(c, {"epochs": 10, "optim.warmup_epochs": 1.0})
    fields = recipes.shortened(warm, 5)
    assert fields["optim.warmup_epochs"] == 0.5
    np.testing.assert_allclose(fields["dkd.warmup_epochs"], 20 * 5 / 240)
    np.testing.assert_allclose(fields["ft.init_epochs"], 30 * 5 / 240)
