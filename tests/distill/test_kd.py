"""Cross-entropy, KD's divergence and the two methods built on the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax import distill
from lakd_jax.distill import kd
from lakd_jax.distill.base import method

cross_entropy = jax.jit(kd.cross_entropy)
# (student, teacher, temperature) -> value and the student's gradient.
divergence = jax.jit(jax.value_and_grad(kd.kd_loss))


def test_cross_entropy_by_hand():
    logits = np.array([[0.0, np.log(3.0)], [0.0, 0.0]])
    want = (np.log(4 / 3) + np.log(2)) / 2
    assert cross_entropy(logits, np.array([1, 0])) == pytest.approx(want, rel=1e-6)


def test_kd_loss_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2) at T = 2.
    teacher = np.array([[2 * np.log(3.0), 0.0]])
    want = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    got, _ = divergence(np.zeros((1, 2), np.float32), teacher, 2.0)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_are_float32_and_never_negative(dtype):
    """Promise 24: in either compute type."""

    @jax.jit
    def both(near, logits, sure):
        hard = kd.cross_entropy(sure, jnp.argmax(logits, -1))
        return kd.kd_loss(near, logits, 4.0), hard

    for seed in range(20):
        logits = 3 * toys.noise(seed, 4, 10).astype(dtype)
        near = (logits.astype(np.float32) * np.float32(1 + 1e-6)).astype(dtype)
        for value in both(near, logits, (1000 * logits).astype(dtype)):
            assert value.dtype == jnp.float32 and value >= 0


def test_kd_gradient_survives_where_the_value_rounds_below_zero():
    # Some of these rows round to a negative divergence; their gradient must stay.
    teacher = 3 * toys.noise(0, 50, 10)
    student = teacher + np.float32(1e-4) * toys.noise(1, 50, 10)

    @jax.jit
    def by_hand(student, teacher):
        p, q = jax.nn.softmax(student), jax.nn.softmax(teacher)
        logs = jax.nn.log_softmax(teacher) - jax.nn.log_softmax(student)
        return jnp.sum(q * logs, -1), (p - q) / 50

    raw, wanted = by_hand(student, teacher)
    assert np.any(np.asarray(raw) < 0)
    _, grad = divergence(student, teacher, 1.0)
    np.testing.assert_allclose(grad, wanted, atol=2e-8)


def test_methods_have_one_module_and_weigh_their_terms():
    student, teacher = toys.noise(3, 2, 2, 4)
    labels = np.array([1, 2])
    ce, (div, _) = cross_entropy(student, labels), divergence(student, teacher, 4.0)
    plain = distill.create("none", {})
    alone = toys.signals(toys.outputs(student), None, labels)
    both = toys.signals(*map(toys.outputs, (student, teacher)), labels)
    start = functools.partial(plain.init, train=True)
    assert jax.eval_shape(start, jax.random.key(0), alone) == {}

    @jax.jit
    def of_none(seen):
        losses = plain.apply({}, seen, train=True)
        assert len(losses) == 1
        return method.total(losses)

    assert of_none(alone) == ce
    options = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}

    @jax.jit
    def of_kd(seen):
        losses = distill.create("kd", options).apply({}, seen, train=True)
        return method.total(losses), method.flatten_metrics(losses)

    total, metrics = of_kd(both)
    assert total == pytest.approx(float(0.1 * ce + 0.9 * div), rel=1e-6)
    assert set(metrics) == {"module1/head_ce", "module1/head_kd"}
    np.testing.assert_allclose(metrics["module1/head_ce"], ce, rtol=1e-6)
    np.testing.assert_allclose(metrics["module1/head_kd"], div, rtol=1e-6)


def test_registry_knows_what_methods_need():
    facts = {
        name: (distill.facts(name).local, distill.facts(name).needs_teacher)
        for name in distill.names()
    }
    alone = {name for name, (_, needs_teacher) in facts.items() if not needs_teacher}
    apart = {name for name, (local, _) in facts.items() if local}
    assert alone == {"none"} and apart == {"lakd"} and {"kd", "dkd", "at"} < set(facts)


def test_registry_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'lakd'"):
        distill.create("lakdd", {})
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        distill.create("kd", {"temprature": 4.0})
    with pytest.raises(ValueError, match="did you mean 'normalise'"):
        distill.create("lakd", {"normalize": "mean"})
    with pytest.raises(ValueError, match="normalise is 'means'; did you mean 'mean'"):
        distill.create("lakd", {"normalise": "means"})
    with pytest.raises(ValueError, match="method is 'x'"):
        distill.create("x", {"a": 1})
