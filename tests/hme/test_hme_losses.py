"""Tests the losses of HME: binary tasks and label smoothing."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax.distill import kd
from lakd_jax.distill.base import method
from lakd_jax.hme import losses, network

LABELS = jnp.asarray([2, 0, 1, 2])


def noise(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def log_softmax(x, axis=-1):
    return x - np.log(np.sum(np.exp(x), axis, keepdims=True))


def signals(student, teacher=None):
    logits = types.SimpleNamespace
    return method.Signals(
        student=logits(logits=student),
        teacher=logits(logits=teacher) if teacher is not None else None,
        labels=LABELS,
        epoch=jnp.float32(0),
        student_joints=(),
        teacher_joints=(),
    )


def test_binary_losses_by_the_two_way_softmax():
    """Losses of the log-odds equal the formulas on both units of each head."""
    units, teacher = np.asarray(noise(4, 3, 2)), np.asarray(noise(4, 3, seed=1))
    yes = np.eye(3)[np.asarray(LABELS)]
    target = np.stack([1 - yes, yes], -1)
    hard = -np.sum(target * log_softmax(units), -1).mean()
    t = 4.0
    q = np.exp(log_softmax(teacher / t))
    target = np.stack([1 - q, q], -1)
    soft = np.sum(target * (np.log(target) - log_softmax(units / t)), -1)
    odds = network.score(jnp.asarray(units), "odds")
    assert float(losses.binary_cross_entropy(odds, LABELS, 1.0)) == pytest.approx(
        hard, rel=1e-5
    )
    assert float(losses.binary_kd(odds, jnp.asarray(teacher), t)) == pytest.approx(
        t**2 * soft.mean(), rel=1e-4
    )


def test_positive_weight():
    odds = noise(4, 3)
    one, three = (losses.binary_cross_entropy(odds, LABELS, w) for w in (1.0, 3.0))
    positive = np.asarray(odds)[np.arange(4), np.asarray(LABELS)]
    extra = 2 * np.log1p(np.exp(-positive)).sum() / odds.size
    assert float(three - one) == pytest.approx(extra, rel=1e-5)


def test_property_13_zero_where_probabilities_agree():
    teacher, t = noise(4, 3), 2.0
    q = jax.nn.softmax(teacher / t)
    odds = t * (jnp.log(q) - jnp.log1p(-q))
    assert float(losses.binary_kd(odds, teacher, t)) == pytest.approx(0, abs=1e-6)
    assert losses.binary_kd(odds + 0.5, teacher, t) > 1e-3
    units = noise(4, 3, 2, seed=1)
    shifted = network.score(units + noise(4, 3, 1, seed=2), "odds")
    np.testing.assert_allclose(shifted, network.score(units, "odds"), atol=1e-6)


@pytest.mark.parametrize("sure", [40.0, 1e4])
def test_binary_losses_are_finite_where_networks_are_sure(sure):
    odds = jnp.asarray([[sure, -sure, -sure]] * 4)
    for term in (
        lambda d: losses.binary_cross_entropy(d, LABELS, 1.0),
        lambda d: losses.binary_kd(d, sure * noise(4, 3), 4.0),
        lambda d: losses.binary_kd(d.astype(jnp.bfloat16), noise(4, 3), 4.0),
    ):
        value, gradient = jax.value_and_grad(term)(odds)
        assert value.dtype == jnp.float32
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
    teacher = jax.grad(lambda t: losses.binary_kd(odds, t, 4.0))(noise(4, 3))
    assert np.all(teacher == 0)


def test_binary_methods_weigh_their_terms():
    odds, teacher = noise(4, 3), noise(4, 3, seed=1)
    (plain,) = losses.BinaryPlain(2.0).apply({}, signals(odds), train=True)
    hard = losses.binary_cross_entropy(odds, LABELS, 2.0)
    assert plain.total() == hard
    both = losses.BinaryKD(0.1, 0.9, 4.0, 2.0)
    (loss,) = both.apply({}, signals(odds, teacher), train=True)
    soft = losses.binary_kd(odds, teacher, 4.0)
    assert float(loss.total()) == pytest.approx(float(0.1 * hard + 0.9 * soft))
    assert set(loss.terms) == {"head_ce", "head_kd"}


def test_label_smoothing_by_hand():
    logits = noise(4, 3)
    target = 0.9 * np.eye(3)[np.asarray(LABELS)] + 0.1 / 3
    expected = -np.sum(target * log_softmax(np.asarray(logits)), -1).mean()
    ours = kd.smoothed_cross_entropy(logits, LABELS, 0.1)
    assert float(ours) == pytest.approx(expected, rel=1e-5)
    plain = kd.cross_entropy(logits, LABELS)
    assert float(kd.smoothed_cross_entropy(logits, LABELS, 0.0)) == float(plain)
