"""The files of configs/ and the recipes: steps, learning rates, pairs of networks."""

import commands
import numpy as np
import pytest

from lakd_jax import config as config_lib
from lakd_jax.config import check, recipes, resolved
from lakd_jax.data import order
from lakd_jax.training import phase

STEPS = 782
STATISTICS = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "cinic10": ((0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587)),
}
SOURCES = {"svhn": "svhn_cropped", "cinic10": "folder:CINIC-10"}


@pytest.mark.parametrize("name", sorted(p.stem for p in commands.CONFIGS.glob("*.py")))
def test_config_file_is_valid(name):
    c = commands.get_config(name)
    assert check.problems(c, 1) == []
    assert config_lib.flat(c).keys() == config_lib.flat(config_lib.default()).keys()


@pytest.mark.parametrize("name", ["cifar10_lakd", "cifar100_lakd"])
def test_argument_of_config_files(name):
    def found(arg):
        c = commands.get_config(name, arg)
        return c.teacher.name, c.student.name, c.method

    assert found("resnet110, resnet32,kd") == ("resnet110", "resnet32", "kd")
    assert found(",resnet8") == ("resnet56", "resnet8", "lakd")
    with pytest.raises(ValueError, match="TEACHER,STUDENT,METHOD"):
        found("a,b,c,d")


@pytest.mark.parametrize(
    ("arg", "found"), [("", ("lakd", ("none", "kd"))), ("kd", ("kd", ("none",)))]
)
def test_argument_of_the_digits_is_a_method(arg, found):
    c = commands.get_config("digits_lakd", arg)
    assert (c.method, c.baselines) == found


@pytest.mark.parametrize("data", STATISTICS)
def test_protocol_is_the_fields(data):
    c = commands.get_config(data, "resnet56,resnet20,kd")
    assert (c.data.source, c.method) == (SOURCES.get(data, data), "kd")
    assert (c.data.mean, c.data.std) == STATISTICS[data]
    flip = data != "svhn"  # a mirrored digit is a different symbol
    assert (c.data.pad, c.data.flip, c.data.minival) == (4, flip, 0.0)
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
    c = commands.get_config("cifar100", f"resnet32x4,{student},kd")
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
    assert commands.get_config("cifar100", f"{pair},dkd").dkd.beta == beta


def test_weight_of_review_is_the_pairs():
    assert recipes.of_pair("resnet32x4", "resnet8x4")["review.weight"] == 5.0
    assert "review.weight" not in recipes.of_pair("resnet56", "resnet20")


def teacher_of(pair):
    return resolved.of_teacher(resolved.resolve(commands.get_config("cifar100", pair)))


def test_teacher_of_a_mobile_student_is_that_of_any_other():
    slow, fast = map(
        teacher_of, ("resnet32x4,shuffle_v2,kd", "resnet32x4,resnet8x4,kd")
    )
    assert slow.optim.lr == fast.optim.lr == 0.05
    assert slow.digest() == fast.digest()
    assert teacher_of("mobilenet_v2,resnet20,kd").optim.lr == 0.01
    plain = config_lib.changed(config_lib.default(), {"optim.lr": 0.3})
    assert resolved.of_teacher(resolved.resolve(plain)).optim.lr == 0.3


def test_shorter_training_keeps_its_proportions():
    c = commands.get_config("cifar100", "resnet56,resnet20,dkd")
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


# ------------------------------------------------------------------------- ImageNet


@pytest.mark.parametrize(
    "arg",
    [
        "resnet50,mobilenet_v1,lakd",
        "resnet34,resnet18,kd",
        "resnet34,resnet18,dkd+at",
        "resnet50,resnet18,none",
        "wrn_40_2,vgg8,kd",  # any pair
    ],
)
def test_pairs_and_methods_go_with_imagenet(arg):
    assert check.problems(commands.get_config("imagenet_lakd", arg), 8) == []


def test_imagenets_rate_falls_after_30_60_and_90_epochs():
    steps = 2503  # 1,281,167 images in batches of 512
    rate = phase.Phase(commands.get_config("imagenet_lakd")).learning_rate(steps)
    found = [float(rate(epoch * steps)) for epoch in (0, 29, 31, 61, 91)]
    assert found == pytest.approx([0.2, 0.2, 0.02, 0.002, 0.0002])


@pytest.mark.parametrize(("batch", "first"), [(512, 0.2), (256, 0.1), (2048, 0.8)])
def test_imagenets_rate_is_in_proportion_to_the_batch(batch, first):
    config = commands.get_config("imagenet_lakd")
    config.batch_size = batch
    assert phase.Phase(config).learning_rate(1)(0) == pytest.approx(first)


def test_imagenets_beta_of_dkd_depends_on_the_pair():
    assert commands.get_config("imagenet_lakd").dkd.beta == 0.5
    mobile = commands.get_config("imagenet_lakd", "resnet50,mobilenet_v1,dkd")
    assert mobile.dkd.beta == 2.0


def test_deits_recipe_is_the_defaults_of_its_public_code():
    """Those of facebookresearch/deit, main.py, and the batch of its README."""
    c = commands.get_config("imagenet_deit")
    assert (c.student.name, c.method) == ("deit_small_distilled", "deit")
    assert (c.epochs, c.batch_size, c.label_smoothing) == (300, 1024, 0.1)
    d = c.data
    assert (d.policy, d.erase, d.jitter) == ("rand-2-9", 0.25, 0.0)
    assert (d.mixup, d.cutmix, d.drop_last) == (0.8, 1.0, True)
    rate = phase.Phase(c).learning_rate(10)
    assert float(rate(0)) == pytest.approx(1e-6, rel=1e-4)
    assert float(rate(2999)) == pytest.approx(1e-5, rel=0.01)
    # Five epochs of 300 into a cosine from 5e-4 * 1024 / 512 to 1e-5.
    after = 1e-5 + 0.99e-3 * (1 + np.cos(np.pi * 5 / 300)) / 2
    assert float(rate(50)) == pytest.approx(after, rel=1e-3)
    assert (c.deit.hard, c.deit.ce_weight, c.deit.weight) == (True, 0.5, 0.5)
    assert (
        check.problems(commands.get_config("imagenet_deit", ",deit_tiny,none"), 8) == []
    )


def test_the_strong_recipe_differs_in_its_policy_alone():
    arg = "resnet32x4,resnet8x4,mlkd"
    strong, plain = (
        config_lib.flat(commands.get_config(name, arg))
        for name in ("cifar100_strong", "cifar100")
    )
    changed = {n: v for n, v in strong.items() if plain[n] != v}
    assert changed == {"data.policy": "fixmatch"}
