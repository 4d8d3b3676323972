"""Cross-entropy, KD's divergence and the two methods built on the logits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax import distill
from lakd_jax.distill import kd, method
from lakd_jax.models import chain

GOLDEN = pathlib.Path(__file__).parent / "golden" / "losses_kd.npz"


def outputs(logits):
    return chain.Outputs(logits, None, (), (), (), jnp.zeros((len(logits), 1)))


def signals(student, teacher, labels):
    return method.Signals(
        student=outputs(student),
        teacher=None if teacher is None else outputs(teacher),
        labels=labels,
        epoch=jnp.float32(0),
        student_joints=(jnp.zeros((2, 1, 1, 1)),),
        teacher_joints=(),
    )


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_loss_matches_golden_value_and_gradient(temperature):
    # Computed with mdistiller's KD loss in PyTorch.
    golden = np.load(GOLDEN)
    value, grad = jax.jit(jax.value_and_grad(kd.kd_loss), static_argnums=2)(
        golden["logits_student"], golden["logits_teacher"], float(temperature)
    )
    assert relative(value, golden[f"kd_t{temperature}"]) < 1e-4
    assert relative(grad, golden[f"kd_t{temperature}/grad_s"]) < 1e-4


def test_cross_entropy_by_hand():
    logits = jnp.array([[0.0, np.log(3.0)], [0.0, 0.0]])
    want = (np.log(4 / 3) + np.log(2)) / 2
    assert kd.cross_entropy(logits, jnp.array([1, 0])) == pytest.approx(want, rel=1e-6)


def test_kd_loss_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2) at T = 2.
    teacher = jnp.array([[2 * np.log(3.0), 0.0]])
    want = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    got = kd.kd_loss(jnp.zeros((1, 2)), teacher, 2.0)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_are_float32_and_never_negative(dtype):
    """Promise 24: in either compute type."""
    keys = jax.random.split(jax.random.key(0), 20)
    for key in keys:
        logits = (3 * jax.random.normal(key, (4, 10))).astype(dtype)
        near = (logits.astype(jnp.float32) * (1 + 1e-6)).astype(dtype)
        value = kd.kd_loss(near, logits, 4.0)
        assert value.dtype == jnp.float32 and value >= 0
        ce = kd.cross_entropy(1000 * logits, jnp.argmax(logits, -1))
        assert ce.dtype == jnp.float32 and ce >= 0


def test_kd_gradient_survives_where_the_value_rounds_below_zero():
    # Some of these rows round to a negative divergence; their gradient must stay.
    teacher = 3 * jax.random.normal(jax.random.key(0), (50, 10))
    student = teacher + 1e-4 * jax.random.normal(jax.random.key(1), (50, 10))
    p, q = jax.nn.softmax(student), jax.nn.softmax(teacher)
    raw = jnp.sum(q * (jax.nn.log_softmax(teacher) - jax.nn.log_softmax(student)), -1)
    assert (raw < 0).any()
    grad = jax.grad(kd.kd_loss)(student, teacher, 1.0)
    np.testing.assert_allclose(grad, (p - q) / 50, atol=2e-8)


def test_kd_loss_gives_the_teacher_no_gradient():
    grad = jax.grad(kd.kd_loss, argnums=1)(jnp.ones((2, 3)), jnp.eye(2, 3), 4.0)
    assert not grad.any()


def test_kd_loss_gradient_by_finite_differences():
    student, teacher, way = jax.random.normal(jax.random.key(2), (3, 4, 5))
    along = jnp.vdot(jax.grad(kd.kd_loss)(student, teacher, 2.0), way)
    step = 1e-2
    high, low = (kd.kd_loss(student + s * way, teacher, 2.0) for s in (step, -step))
    assert along == pytest.approx(float(high - low) / (2 * step), rel=1e-3)


def test_methods_have_one_module_and_weigh_their_terms():
    student, teacher = jax.random.normal(jax.random.key(3), (2, 2, 4))
    labels = jnp.array([1, 2])
    ce, div = kd.cross_entropy(student, labels), kd.kd_loss(student, teacher, 4.0)
    plain = distill.create("none", {})
    assert (
        plain.init(jax.random.key(0), signals(student, None, labels), train=True) == {}
    )
    losses = plain.apply({}, signals(student, None, labels), train=True)
    assert len(losses) == 1 and method.total(losses) == ce

    options = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
    losses = distill.create("kd", options).apply(
        {}, signals(student, teacher, labels), train=True
    )
    assert method.total(losses) == pytest.approx(float(0.1 * ce + 0.9 * div), rel=1e-6)
    metrics = method.flatten_metrics(losses)
    assert metrics == {"module1/head_ce": ce, "module1/head_kd": div}


def test_registry_knows_what_methods_need():
    facts = {
        name: (distill.METHODS[name].local, distill.METHODS[name].needs_teacher)
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
