"""Methods on logits: how they weigh their losses, standardise and read heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest
import tap_toys
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.distill import dist, kd, mlkd, nkd, sdd, wttm
from lakd_jax.distill.base import method, numerics


def signals():
    return toys.signals(
        toys.outputs(loss_cases.STUDENT),
        toys.outputs(loss_cases.TEACHER),
        loss_cases.LABELS,
        epoch=np.float32(3),
        student_joints=(loss_cases.STUDENT_MAP,),
        teacher_joints=(loss_cases.TEACHER_MAP,),
    )


SHARED = {"ce_weight": 0.0, "weight": 2.0, "warmup_epochs": 0.0}
TTM = {"exponent": 0.1}
METHODS = {
    "dist": {"beta": 2.0, "gamma": 0.5, "temperature": 4.0},
    "nkd": {"gamma": 1.5, "temperature": 2.0},
    "ttm": TTM,
    "wttm": TTM,
    "mlkd": {"temperatures": (2.0, 3.0), "batch_weight": 0.5, "class_weight": 0.25},
    "ctkd": {
        "temperature_min": 1.0,
        "temperature_span": 20.0,
        "lambda_min": 0.0,
        "lambda_max": 1.0,
        "lambda_epochs": 10.0,
    },
}


def raw_loss(name, student, teacher, standardise):
    if standardise and name != "mlkd":
        student, teacher = kd.standardised(student), kd.standardised(teacher)
    own = METHODS[name]
    match name:
        case "dist":
            return dist.dist_loss(student, teacher, **own)
        case "nkd":
            return nkd.nkd_loss(student, teacher, loss_cases.LABELS, **own)
        case "mlkd":
            return mlkd.mlkd_loss(student, teacher, **own, standardise=standardise)
        case "ctkd":
            return loss_cases.reversed_ctkd(student, teacher)
    loss = {"ttm": wttm.ttm_loss, "wttm": wttm.wttm_loss}[name]
    return loss(student, teacher, **own)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_methods_weigh_their_loss_and_standardise(name, standardise):
    made = distill.create(name, SHARED | METHODS[name] | {"standardise": standardise})

    @jax.jit
    def run(given):
        (loss,), _ = made.init_with_output(jax.random.key(0), given, train=True)
        pair = given.student.logits, given.teacher.logits
        return loss.terms[name], loss.total(), raw_loss(name, *pair, standardise)

    term, total, wanted = run(signals())
    np.testing.assert_allclose(term, wanted, rtol=1e-5)
    np.testing.assert_allclose(total, 2 * wanted, rtol=1e-5)


def test_ctkd_trains_its_temperature_upwards_in_loss():
    """One step of descent on what the method gives raises KD's divergence."""
    made = distill.create("ctkd", SHARED | METHODS["ctkd"] | {"standardise": False})
    start = functools.partial(made.init, train=True)
    params = jax.jit(start)(jax.random.key(0), signals())["params"]
    assert list(params) == ["head"]

    @jax.jit
    @jax.value_and_grad
    def total(params):
        return method.total(made.apply({"params": params}, signals(), train=True))

    before, grad = total(params)
    after = jax.tree.map(lambda p, g: np.asarray(p - 0.1 * g), params, grad)
    assert total(after)[0] > before


@pytest.mark.parametrize("base", sdd.BASES)
@pytest.mark.parametrize("standardise", [False, True])
def test_sdd_reads_both_heads(base, standardise):
    options = {
        "base": base,
        "scales": (1, 2),
        "complementary": 2.0,
        "temperature": 2.0 if base == "nkd" else 4.0,
        "alpha": 1.0,
        "beta": 8.0,
        "gamma": 1.5,
        "standardise": standardise,
    }
    made = distill.create("sdd", SHARED | options)
    heads = {
        "student_head": lambda x: 2 * jnp.mean(x, (1, 2)),
        "teacher_head": lambda x: jnp.mean(x, (1, 2)),
    }

    @jax.jit
    def run(given):
        whole = dataclasses.replace(given, **heads)
        (loss,) = made.apply({}, whole, train=True)
        (ours,), (theirs,) = given.student_joints, given.teacher_joints
        ours, theirs = sdd.cells(2 * ours, (1, 2)), sdd.cells(theirs, (1, 2))
        if standardise:
            ours, theirs = kd.standardised(ours), kd.standardised(theirs)
        wanted = sdd.sdd_loss(
            ours,
            theirs,
            loss_cases.TEACHER,
            loss_cases.LABELS,
            2.0,
            loss_cases.BASES[base],
        )
        return loss.terms["sdd"], wanted

    got, wanted = run(signals())
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_mean_of_class_activation_maps_is_the_logits():
    options = config_lib.default()["catkd"].to_dict()
    lesson, batch = toys.lesson(options, name="catkd", cut_scale=1.0), toys.images()
    student = tap_toys.variables(lesson.student, batch[0])

    @jax.jit
    def run(student, x, y):
        signals = lesson.signals(student["params"], student["batch_stats"], x, y)
        maps = [
            numerics.logit_map(head, joints[-1])
            for head, joints in (
                (signals.student_head, signals.student_joints),
                (signals.teacher_head, signals.teacher_joints),
            )
        ]
        return signals, maps

    signals, maps = run(student, *batch)
    for joints, outputs, found in (
        (signals.student_joints, signals.student, maps[0]),
        (signals.teacher_joints, signals.teacher, maps[1]),
    ):
        assert found.shape == (*joints[-1].shape[:3], toys.CLASSES)
        np.testing.assert_allclose(
            np.mean(found, (1, 2)), outputs.logits, rtol=1e-4, atol=1e-6
        )
