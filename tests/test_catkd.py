"""CAT-KD: the public code's values, and the maps themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax import config_methods
from lakd_jax.distill import catkd, relation

# (normalise, binarise) -> value and norm of the student's gradient, computed with the
# public code of CAT-KD on the maps below.
PUBLIC = {
    (False, False): (0.24462813, 0.050697494),
    (False, True): (0.15852170, 0.044784971),
    (True, False): (0.56696242, 0.10465724),
    (True, True): (0.52116007, 0.11837061),
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


STUDENT, TEACHER = draw(0, 4, 5, 5, 3), draw(1, 4, 6, 6, 3)


def loss(student, teacher, normalise=False, binarise=False):
    return catkd.cam_loss(student, teacher, 2, normalise=normalise, binarise=binarise)


@pytest.mark.parametrize("options", PUBLIC)
def test_values_and_gradients_are_the_public_ones(options):
    value, grad = jax.value_and_grad(loss)(STUDENT, TEACHER, *options)
    np.testing.assert_allclose(
        [value, jnp.linalg.norm(grad)], PUBLIC[options], rtol=1e-4
    )


@pytest.mark.parametrize("options", PUBLIC)
def test_teacher_gets_no_gradient(options):
    grad = jax.grad(loss, argnums=1)(STUDENT, TEACHER, *options)
    assert not np.any(np.asarray(grad))


def test_least_where_maps_agree_and_scale_matters_only_unless_normalised():
    assert loss(TEACHER, TEACHER) == 0
    assert loss(2 * TEACHER, TEACHER, normalise=True) < 1e-12
    assert loss(2 * TEACHER, TEACHER) > 0.01


def test_maps_of_zeros_and_bfloat16_are_finite():
    value, grad = jax.value_and_grad(loss)(0 * STUDENT, TEACHER, normalise=True)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    halves = STUDENT.astype(jnp.bfloat16), TEACHER.astype(jnp.bfloat16)
    value = loss(*halves, normalise=True, binarise=True)
    assert value.dtype == jnp.float32 and np.isfinite(value)


def test_the_mean_of_the_maps_is_the_logits():
    options = config_methods.blocks()["catkd"].to_dict()
    lesson, params, stats, batch = toys.made(options, name="catkd", cut_scale=1.0)
    signals, _ = lesson.signals(params["student"], stats["student"], *batch)
    for head, joints, outputs in (
        (signals.student_head, signals.student_joints, signals.student),
        (signals.teacher_head, signals.teacher_joints, signals.teacher),
    ):
        maps = relation.logit_map(head, joints[-1])
        assert maps.shape == (*joints[-1].shape[:3], toys.CLASSES)
        np.testing.assert_allclose(
            jnp.mean(maps, (1, 2)), outputs.logits, rtol=1e-4, atol=1e-6
        )
