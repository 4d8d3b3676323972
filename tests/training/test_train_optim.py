"""Tests schedules and optimisers: by hand, and against timm's recorded values."""

import dataclasses

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lakd_jax.config import optimiser
from lakd_jax.training import optim, phase

GOLDEN = dict(np.load(golden_weights.FOLDER / "recipes" / "optim.npz"))


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


@pytest.mark.parametrize(
    ("name", "epochs", "fields"),
    [
        ("deit", 300, {"warmup_epochs": 5.0, "cosine_from": "start"}),
        ("timm_prefix", 35, {"warmup_epochs": 5.0}),
        (
            "updates",
            10,
            {"warmup_epochs": 2.0, "cosine_from": "start", "steps_per_epoch": 7},
        ),
    ],
)
def test_schedules_are_those_of_timm(name, epochs, fields):
    """Of `deit` every epoch is one step here; it stays at the floor after 300."""
    settings = {"steps_per_epoch": 1, "floor": 1e-5, "start": 1e-6} | fields
    schedule = optim.schedule(
        "cosine", 5e-4, epochs=epochs, milestones=(), decay=0.0, **settings
    )
    expected = GOLDEN[f"{name}/lr"]
    found = jax.vmap(schedule)(jnp.arange(len(expected)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-10)


def test_all_rates_are_in_proportion_to_the_batch():
    fields = {"lr": 0.1, "lr_floor": 0.02, "lr_start": 0.05, "lr_batch": 256}
    options = optimiser.Optim(schedule="cosine", warmup_epochs=1.0, **fields)
    config = dataclasses.replace(
        phase.resolved.Config(), batch_size=512, epochs=3, optim=options
    )
    rate = phase.Phase(config).learning_rate(10)
    np.testing.assert_allclose([rate(0), rate(10), rate(30)], [0.1, 0.2, 0.04], 1e-6)


def golden_params(prefix):
    """Returns parameters of the golden optimiser, shared among two modules."""
    found = {n: GOLDEN[f"{prefix}_{n}"] for n in ("pos_embed", "weight", "bias")}
    return {"stem": found, "block": {"layer_scale": GOLDEN[f"{prefix}_layer_scale"]}}


def updated(optimizer, params, steps):
    """Returns the parameters after each of the steps with these gradients."""
    state, after = optimizer.init(params), []
    for grads in steps:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after


def test_adamw_is_that_of_timm():
    """Five steps; embeddings and biases are not decayed, (C, 1, 1) arrays are."""
    options = optimiser.Optim(name="adamw", weight_decay=0.05, decay_mask=True)
    params = golden_params("start")
    labels = {"stem": dict.fromkeys(params["stem"], 0), "block": {"layer_scale": 1}}
    optimizer = optim.create(options, optax.constant_schedule(1e-2), labels)
    steps = [
        jax.tree.map(lambda x, i=i: x[i], golden_params("grads")) for i in range(5)
    ]
    for i, got in enumerate(updated(optimizer, params, steps)):
        wanted = jax.tree.map(lambda x, i=i: x[i], golden_params("after"))
        far = jax.tree.leaves(jax.tree.map(golden_weights.distance, got, wanted))
        assert len(far) == 4 and max(far) < 1e-6


GRADIENTS = [np.array(g) for g in ([0.5, 0.1], [-0.3, 0.2], [0.0, 1.0])]


def by_hand(name, p, grads, lr=0.1, wd=0.01, b1=0.8, b2=0.9, eps=1e-3):
    """Yields the parameters after each step, written from the papers."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if name == "lion":
            p, m = (
                p - lr * (np.sign(b1 * m + (1 - b1) * g) + wd * p),
                b2 * m + (1 - b2) * g,
            )
            yield p
            continue
        g = g + wd * p if name == "adam" else g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        if name != "adam":
            step = step + wd * p
        if name == "lamb":
            step = step * np.linalg.norm(p) / np.linalg.norm(step)
        p = p - lr * step
        yield p


@pytest.mark.parametrize("name", optimiser.NAMES[1:])
def test_optimisers_by_hand(name):
    """They read their own betas and epsilon."""
    options = optimiser.Optim(
        name=name, weight_decay=0.01, beta1=0.8, beta2=0.9, eps=1e-3
    )
    optimizer = optim.create(options, optax.constant_schedule(0.1), {"w": 0})
    start = np.array([1.0, -2.0])
    steps = [{"w": jnp.asarray(g, jnp.float32)} for g in GRADIENTS]
    found = updated(optimizer, {"w": jnp.asarray(start, jnp.float32)}, steps)
    for got, wanted in zip(found, by_hand(name, start, GRADIENTS), strict=True):
        np.testing.assert_allclose(got["w"], wanted, rtol=1e-5)


@pytest.mark.parametrize("name", optimiser.NAMES)
def test_every_optimiser_clips_per_module(name):
    """A gradient above the limit is as one that was clipped before."""
    options = optimiser.Optim(name=name, clip_norm=1.0)
    labels, params = {"a": 0, "b": 1}, {"a": jnp.ones(2), "b": jnp.ones(2)}
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4])}
    clipped = grads | {"a": jnp.array([0.6, 0.8])}
    plain = dataclasses.replace(options, clip_norm=0.0)
    rate = optax.constant_schedule(0.1)
    (got,) = updated(optim.create(options, rate, labels), params, [grads])
    (wanted,) = updated(optim.create(plain, rate, labels), params, [clipped])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, wanted)


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


def test_the_mask_leaves_out_vectors_and_tokens():
    """`decay_norm` and DOT read the same mask through `decayed`."""
    ones = jnp.ones
    params = {
        "embed": {"pos_embed": ones((1, 5, 4)), "cls_token": ones((1, 1, 4))},
        "attention": {"kernel": ones((4, 2, 3)), "bias": ones((2, 3))},
        "block": {
            "gamma": ones(4),
            "norm": {"scale": ones(4)},
            "vam_gate": ones((2, 2)),
        },
        "head": {"kernel": ones((4, 3)), "dist_token": ones((1, 1, 4)), "t": ones(())},
    }
    kept = {"attention/kernel", "head/kernel"}
    decayed = jax.tree_util.tree_leaves_with_path(optim.decayed(params, masked=True))
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in decayed}
    assert {name for name, x in names.items() if jnp.all(x == 1)} == kept
    assert all(jnp.all(x == 0) for name, x in names.items() if name not in kept)
    labels, zero = (
        jax.tree.map(lambda _: 0, params),
        jax.tree.map(jnp.zeros_like, params),
    )
    for name in optimiser.NAMES:
        options = optimiser.Optim(name=name, weight_decay=0.1, decay_mask=True)
        optimizer = optim.create(options, optax.constant_schedule(1.0), labels)
        (after,) = updated(optimizer, params, [zero])
        moved = jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after, params)
        )
        found = {
            jax.tree_util.keystr(p, simple=True, separator="/") for p, x in moved if x
        }
        assert found == kept, name
