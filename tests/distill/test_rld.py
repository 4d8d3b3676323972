"""Refined logit distillation: the public code's values, gradients and edge cases."""

import functools

import commands
import golden_weights
import jax
import numpy as np
import precision
import pytest
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.distill import rld

INPUTS = golden_weights.arrays("losses_inputs")
GOLDEN = golden_weights.arrays("newer")
LABELS = INPUTS["labels"].astype(np.int32)
LOSSES = {"scd": rld.scd_loss, "mcd": rld.mcd_loss}
TEACHERS = ("plain", "right", "some_right", "edge")
CLOSE = 1e-5  # as the public code's float32 is to its float64, five times over


def pair(teacher):
    """Logits of the student and of one of `TEACHERS`."""
    if teacher == "plain":
        return INPUTS["logits_student"], INPUTS["logits_teacher"]
    student = INPUTS["logits_student"]
    if teacher == "edge":
        student = GOLDEN["inputs/logits_student_edge"]
    return student, GOLDEN[f"inputs/logits_teacher_{teacher}"]


@functools.cache
def program(name):
    run = jax.value_and_grad(LOSSES[name], argnums=(0, 1))
    return jax.jit(run, static_argnums=3)


@pytest.mark.parametrize("temperature", [1, 4])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_the_public_ones(name, teacher, temperature):
    value, (ours, theirs) = program(name)(*pair(teacher), LABELS, float(temperature))
    key = f"rld/{teacher}/{name}_t{temperature}"
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, GOLDEN[key], rtol=CLOSE)
    assert golden_weights.distance(ours, GOLDEN[f"{key}/grad_s"]) < CLOSE
    assert not np.any(theirs)


def test_who_has_no_classes_left_learns_none():
    """Row 2's label is the lowest, row 3 has one class left: 0, gradient exactly 0."""
    _, teacher = pair("edge")
    below = np.sum(teacher < teacher[np.arange(len(LABELS)), LABELS][:, None], -1)
    assert list(below[[2, 3]]) == [0, 1]
    for row in (2, 3):
        one = (x[row : row + 1] for x in (*pair("edge"), LABELS))
        value, (grad, _) = program("mcd")(*one, 4.0)
        assert value == 0 and not np.any(grad)


def test_only_classes_below_the_label_matter_to_the_correlation():
    student, teacher = pair("plain")
    rows = np.arange(len(LABELS))
    above = teacher >= teacher[rows, LABELS][:, None]
    assert 8 < above.sum() < above.size
    value, (grad, _) = program("mcd")(student, teacher, LABELS, 4.0)
    assert not np.any(grad[above])
    moved = np.where(above, student + 3, student)
    again, _ = program("mcd")(moved, teacher, LABELS, 4.0)
    np.testing.assert_allclose(again, value, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name):
    """Where the public code's logarithm of a softmax is infinite."""
    flat = np.zeros((8, 10), np.float32)
    sure = 1000 * np.eye(10, dtype=np.float32)[LABELS]
    for both in ((flat, sure), (sure, flat), (-sure, sure), (sure, -sure)):
        value, (grad, _) = program(name)(*both, LABELS, 1.0)
        assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    loss = functools.partial(LOSSES[name], labels=LABELS, temperature=4.0)
    assert precision.arithmetic(loss, *precision.halves(pair("plain"))) == {"float32"}


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("cifar_same_t", {}),
        ("cifar_default", {"alpha_temperature": 1.0}),
        ("imagenet_b0.5", {"alpha_temperature": 1.0, "temperature": 1.0, "beta": 0.5}),
        ("imagenet_b2", {"alpha_temperature": 1.0, "temperature": 1.0, "beta": 2.0}),
        (
            "standardized_t2",
            {"standardise": True, "weight": 9.0}
            | dict.fromkeys(("alpha_temperature", "temperature"), 2.0),
        ),
    ],
)
def test_the_methods_settings_are_the_public_ones(key, options):
    """After the warm-up, without the cross-entropy; the default is README's command."""
    block = config_lib.default()["rld"].to_dict()
    made = distill.create("rld", block | {"ce_weight": 0.0} | options)
    _, teacher = pair("plain")

    @jax.jit
    @jax.value_and_grad
    def total(student):
        given = toys.outputs(student), toys.outputs(teacher), LABELS
        signals = toys.signals(*given, epoch=np.float32(30))
        (loss,) = made.apply({}, signals, train=True)
        return loss.total()

    value, grad = total(INPUTS["logits_student"])
    np.testing.assert_allclose(value, GOLDEN[f"rld/{key}"], rtol=CLOSE)
    assert golden_weights.distance(grad, GOLDEN[f"rld/{key}/grad_s"]) < CLOSE


def test_imagenets_beta_depends_on_the_pair():
    found = commands.get_config("imagenet_lakd").rld
    assert (found.temperature, found.alpha_temperature, found.beta) == (1.0, 1.0, 0.5)
    mobile = commands.get_config("imagenet_lakd", "resnet50,mobilenet_v1,rld")
    assert mobile.rld.beta == 2.0
