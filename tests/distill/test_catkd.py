"""CAT-KD: the public code's values, and the maps themselves."""

import functools

import jax
import numpy as np
import precision
import pytest
import tap_toys
import toys

from lakd_jax import config as config_lib
from lakd_jax.distill import catkd
from lakd_jax.distill.base import numerics

# (normalise, binarise) -> value and norm of the student's gradient, computed with the
# public code of CAT-KD on the maps below.
PUBLIC = {
    (False, False): (0.24462813, 0.050697494),
    (False, True): (0.15852170, 0.044784971),
    (True, False): (0.56696242, 0.10465724),
    (True, True): (0.52116007, 0.11837061),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


STUDENT, TEACHER = draw(0, 4, 5, 5, 3), draw(1, 4, 6, 6, 3)


def loss(student, teacher, normalise=False, binarise=False):
    return catkd.cam_loss(student, teacher, 2, normalise=normalise, binarise=binarise)


# Of STUDENT and TEACHER alone: the value, and both gradients.
program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
# For maps of one size.
value_of = jax.jit(loss, static_argnames=("normalise", "binarise"))


@pytest.mark.parametrize("options", PUBLIC)
def test_values_and_gradients_are_the_public_ones(options):
    value, (grad, _) = program(STUDENT, TEACHER, *options)
    np.testing.assert_allclose(
        [value, np.linalg.norm(grad)], PUBLIC[options], rtol=1e-4
    )


@pytest.mark.parametrize("options", PUBLIC)
def test_teacher_gets_no_gradient(options):
    _, (_, grad) = program(STUDENT, TEACHER, *options)
    assert not np.any(np.asarray(grad))


def test_least_where_maps_agree_and_scale_matters_only_unless_normalised():
    assert value_of(TEACHER, TEACHER) == 0
    assert value_of(2 * TEACHER, TEACHER, normalise=True) < 1e-12
    assert value_of(2 * TEACHER, TEACHER) > 0.01


def test_maps_of_zeros_are_finite_and_bfloat16_is_computed_in_float32():
    value, (grad, _) = program(0 * STUDENT, TEACHER, True, False)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    halves = precision.halves((STUDENT, TEACHER))
    for normalise, binarise in PUBLIC:
        run = functools.partial(loss, normalise=normalise, binarise=binarise)
        assert precision.arithmetic(run, *halves) == {"float32"}


def test_the_mean_of_the_maps_is_the_logits():
    options = config_lib.default()["catkd"].to_dict()
    lesson, batch = toys.lesson(options, name="catkd", cut_scale=1.0), toys.images()
    student = tap_toys.variables(lesson.student, batch[0])

    @jax.jit
    def run(student, x, y):
        signals, _ = lesson.signals(student["params"], student["batch_stats"], x, y)
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
