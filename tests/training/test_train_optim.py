"""Tests schedules and SGD against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lakd_jax.training import optim


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("step", 0.0, {0: 0.5, 19: 0.5, 20: 0.05, 29: 0.05, 30: 0.005, 39: 0.005}),
        ("cosine", 1.0, {0: 0.05, 9: 0.5, 25: 0.25, 40: 0.0}),
        ("constant", 0.0, {0: 0.5, 39: 0.5}),
    ],
)
def test_schedules_by_hand(kind, warmup, expected):
    """Four epochs of ten steps, with milestones after the second and the third."""
    schedule = optim.schedule(
        kind,
        0.5,
        epochs=4,
        steps_per_epoch=10,
        milestones=(2.0, 3.0),
        decay=0.1,
        warmup_epochs=warmup,
    )
    found = [schedule(step) for step in expected]
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6, atol=1e-7)


def sgd(labels, rate=0.1, **fields):
    options = {"momentum": 0.9, "weight_decay": 0.01, "clip_norm": 0.0} | fields
    schedule = optax.constant_schedule(rate)
    return optim.sgd(schedule, nesterov=False, labels=labels, **options)


def test_sgd_matches_pytorch():
    """Checks three steps of v = m v + (g + wd p); p -= lr v."""
    optimizer = sgd({"w": 0})
    params = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    p, v = np.array([1.0, -2.0]), np.zeros(2)
    for g in ([0.5, 0.1], [-0.3, 0.2], [0.0, 1.0]):
        updates, state = optimizer.update({"w": jnp.array(g)}, state, params)
        params = optax.apply_updates(params, updates)
        v = 0.9 * v + (np.array(g) + 0.01 * p)
        p = p - 0.1 * v
        np.testing.assert_allclose(params["w"], p, rtol=1e-6)


def test_clipping_is_per_module():
    labels = {"a": 0, "b": 0, "c": 1}
    clip = optim.clip_by_module_norm(1.0, labels)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0]), "c": jnp.array([0.5])}
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["a"], [0.6], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped["c"], [0.5])  # below the limit: unchanged


def test_gates_are_not_decayed():
    params = {"conv": {"kernel": jnp.ones(3), "vam_gate": jnp.full(2, 5.0)}}
    labels = jax.tree.map(lambda _: 0, params)
    optimizer = sgd(labels, 1.0, weight_decay=0.1, clip_norm=1.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["conv"]["vam_gate"], 0.0)
    kept = optim.decayed(params)
    np.testing.assert_array_equal(kept["conv"]["vam_gate"], 0.0)
    assert kept["conv"]["kernel"] is params["conv"]["kernel"]
    params["conv"]["vam_gate"] = jnp.full(2, jnp.inf)
    assert np.isnan(optim.decayed(params)["conv"]["vam_gate"]).all()
