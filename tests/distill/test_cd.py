"""Channel distillation: the public code's values and its schedule of weights."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.distill import cd, kd
from lakd_jax.distill.base import method


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


STUDENT = [draw(5, 4, 6, 6, 3), draw(6, 4, 3, 3, 5)]
TEACHER = [draw(7, 4, 6, 6, 3), draw(8, 4, 4, 4, 5)]
LOGITS = draw(9, 6, 4), draw(10, 6, 4)
LABELS = np.array([3, 3, 0, 3, 0, 1])  # of which the teacher gets the first three


channels = jax.jit(jax.value_and_grad(cd.channel_loss, argnums=(0, 1)))
guided = jax.jit(jax.value_and_grad(cd.guided_kd_loss, argnums=(0, 1)))


def test_channels_are_the_public_ones():
    """Computed with the public code of channel distillation."""
    value, (grads, theirs) = channels(STUDENT, TEACHER)
    np.testing.assert_allclose(
        [value, *map(np.linalg.norm, map(np.ravel, grads))],
        [0.14113063, 0.016110135, 0.050133307],
        rtol=1e-4,
    )
    assert not any(np.any(np.asarray(g)) for g in theirs)


@pytest.mark.parametrize(
    ("temperature", "public"),
    [(1.0, (0.45324183, 0.29519784)), (3.0, (0.49931243, 0.30372944))],
)
def test_the_guided_part_is_the_public_one(temperature, public):
    """Computed with the public code of channel distillation."""
    value, (grad, theirs) = guided(*LOGITS, LABELS, temperature)
    np.testing.assert_allclose([value, np.linalg.norm(grad)], public, rtol=1e-4)
    assert not np.any(np.asarray(theirs))


def test_the_guided_part_is_kd_of_what_the_teacher_gets_right():
    right = [x[:3] for x in LOGITS]
    got, (grad, _) = guided(*LOGITS, LABELS, 4.0)
    np.testing.assert_allclose(got, jax.jit(kd.kd_loss)(*right, 4.0), rtol=1e-5)
    assert np.all(np.any(np.asarray(grad[:3]), -1)) and not np.any(np.asarray(grad[3:]))
    wrong = (np.argmax(LOGITS[1], -1) + 1) % 4
    value, (grad, _) = guided(*LOGITS, wrong, 4.0)
    assert value == 0 and not np.any(np.asarray(grad))


def test_least_where_channels_agree_wherever_they_respond():
    moved = [np.roll(x, 1, axis=2) for x in TEACHER]
    assert jax.jit(cd.channel_loss)(moved, TEACHER) < 1e-12
    assert abs(guided(LOGITS[1], LOGITS[1], LABELS, 1.0)[0]) < 1e-6


def test_bfloat16_is_computed_in_float32():
    halves, logits = precision.halves(((STUDENT, TEACHER), LOGITS))
    assert precision.arithmetic(cd.channel_loss, *halves) == {"float32"}
    run = functools.partial(cd.guided_kd_loss, labels=LABELS, temperature=1.0)
    assert precision.arithmetic(run, *logits) == {"float32"}


def test_the_teacher_decays_and_labels_wait():
    """The rates of the public CIFAR settings in epochs 60, 61, 160 (counted from 1)."""
    options = config_lib.default()["cd"].to_dict()
    options |= {"decay_epochs": (60.0, 160.0), "alone_epochs": 60.0}
    taught = distill.create("cd", options)
    joints = [draw(k, 6, 8 // 2**k, 8 // 2**k, 3) for k in range(3)]

    @jax.jit
    def weights(epoch):
        outputs = types.SimpleNamespace(logits=jnp.asarray(LOGITS[0]))
        signals = method.Signals(
            student=outputs,
            teacher=outputs,
            labels=jnp.asarray(LABELS),
            epoch=epoch,
            student_joints=tuple(joints),
            teacher_joints=tuple(joints),
        )
        losses, _ = taught.init_with_output(jax.random.key(0), signals, train=True)
        return [loss.weights for loss in losses]

    for epoch, share, labelled in (
        (58.9, 6.0, 0.0),
        (59.0, 5.4, 0.0),
        (60.0, 5.4, 1.0),
        (159.0, 4.86, 1.0),
    ):
        found = weights(epoch)
        assert len(found) == 3 and set(found[0]) == {"cd"}
        np.testing.assert_allclose([w["cd"] for w in found], [share] * 3, rtol=1e-6)
        last = [found[-1]["head_ce"], found[-1]["gkd"]]
        np.testing.assert_allclose(last, [labelled, 0.1 * labelled], rtol=1e-6)
