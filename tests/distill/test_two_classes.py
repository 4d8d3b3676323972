"""Two classes: losses that cannot teach are refused or reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax import config as config_lib
from lakd_jax import distill, errors
from lakd_jax.config import resolved
from lakd_jax.distill import deepkd, dist, dkd, kd, nkd, rld, wkd
from lakd_jax.runs import checks

LOGITS = np.random.default_rng(0).normal(0, 2, (2, 16, 3)).astype(np.float32)
LABELS = np.arange(16) % 2


def scale(loss, classes):
    """The largest gradient of a loss at the student's logits."""
    student, teacher = jnp.asarray(LOGITS[..., :classes])
    return float(jnp.abs(jax.grad(lambda s: loss(s, teacher))(student)).max())


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: kd.kd_loss(kd.standardised(s), kd.standardised(t), 2.0),
        lambda s, t: dkd.dkd_loss(s, t, LABELS, 0.0, 8.0, 4.0),
        lambda s, t: dist.dist_loss(s, t, 1.0, 0.0, 4.0),
        lambda s, t: rld.mcd_loss(s, t, LABELS, 1.0),
        lambda s, t: deepkd.nckd_loss(s, t, LABELS, 1.0, s.shape[-1]),
        lambda s, t: wkd.logit_distance(s, t, LABELS, 1 - jnp.eye(s.shape[-1]), 1.0),
        lambda s, t: (
            nkd.nkd_loss(s, t, LABELS, 1.5, 1.0) - nkd.nkd_loss(s, t, LABELS, 0.0, 1.0)
        ),
    ],
)
def test_what_is_refused_or_reported_has_no_gradient(loss):
    assert scale(loss, 2) < 1e-4 < 1e-3 < scale(loss, 3)


def check(method, classes=2, **fields):
    lines = []
    changes = {"method": method} | {k.replace("__", "."): v for k, v in fields.items()}
    config = config_lib.changed(config_lib.default(), changes)
    checks.two_classes(resolved.resolve(config), classes, lines.append)
    return lines


STANDARDISING = [
    name for name in distill.names() if "standardise" in distill.option_names(name)
]


@pytest.mark.parametrize("name", STANDARDISING)
def test_standardised_logits_are_refused(name):
    field = distill.option_sources(name)["standardise"]
    fields = {field.replace(".", "__"): True}
    with pytest.raises(errors.ConfigError, match=f"{field} is True.*set it to False"):
        check(name, **fields)
    assert check(name, classes=3, **fields) == []


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("dkd", {"dkd__alpha": 0.0}, "dkd.alpha is 0, but with two classes only"),
        (
            "wkd_l",
            {"wkd_l__target_weight": 0.0},
            "wkd_l.target_weight is 0, but with two classes only",
        ),
        ("kd+dist", {"dist__gamma": 0.0}, "dist.gamma is 0, but with two classes"),
    ],
)
def test_a_constant_loss_is_refused(name, fields, words):
    with pytest.raises(errors.ConfigError, match=words):
        check(name, **fields)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("kd", []),
        ("at", []),
        ("dkd", ["of the losses of dkd only the one that dkd.alpha weighs can teach"]),
        ("nkd+at", ["of the losses of nkd only the label's can teach"]),
    ],
)
def test_a_part_that_cannot_teach_is_reported(name, lines):
    assert check(name) == [f"two classes: {line}" for line in lines]
    assert check(name, classes=3) == []
