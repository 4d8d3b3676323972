"""Overhaul: margins against the Gaussian formula, which stage counts how much."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import precision
import tap_toys
from scipy import stats

from lakd_jax.distill import ofd
from lakd_jax.distill.base import method

MEANS = np.array([-1.0, 0.0, 0.5, 2.0])
SCALES = np.array([1.0, 2.0, 0.5, 1.5])


@functools.partial(jax.jit, static_argnames="train")
def step(state, x, train=True):
    return ofd.Margin().apply(
        {"batch_stats": state}, x, train=train, mutable=["batch_stats"]
    )


def learnt(batches):
    """The margins after some batches (B, H, W, C), and the collection behind them."""
    made = tap_toys.variables(ofd.Margin(), batches[0])
    stats = jax.tree.map(np.zeros_like, made["batch_stats"])
    for x in batches:
        margin, new = step(stats, x)
        stats = new["batch_stats"]
    return margin, stats


def test_margins_converge_to_the_gaussian_formula():
    """E[x | x < 0] = m - s pdf(m / s) / cdf(-m / s)."""
    rng = np.random.default_rng(0)
    batches = MEANS + SCALES * rng.standard_normal((20, 16, 16, 16, 4))
    margin, _ = learnt(batches.astype(np.float32))
    z = MEANS / SCALES
    wanted = MEANS - SCALES * stats.norm.pdf(z) / stats.norm.cdf(-z)
    np.testing.assert_allclose(margin, wanted, rtol=0.02)


def test_margins_are_the_mean_of_all_negatives_so_far():
    """Batches with few negatives count for less, a channel without any has 0."""
    first = np.array([[-1.0, 2.0], [-3.0, 1.0]]).reshape(1, 2, 1, 2)
    second = np.array([[-8.0, 2.0], [5.0, 0.0]]).reshape(1, 2, 1, 2)
    margin, _ = learnt([first.astype(np.float32), second.astype(np.float32)])
    np.testing.assert_allclose(margin, [-4.0, 0.0], rtol=1e-6)


def test_margins_stay_in_evaluation():
    low = np.full((2, 1, 2, 2), -1.0, np.float32)
    _, state = learnt([low])
    margin, new = step(state, 9 * low, train=False)
    np.testing.assert_allclose(margin, [-1.0] * 2)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], state)


def signals(student, teacher):
    return method.Signals(
        student=types.SimpleNamespace(logits=jnp.zeros((4, 3))),
        teacher=None,
        labels=jnp.zeros(4, jnp.int32),
        epoch=jnp.float32(0),
        student_joints=(),
        teacher_joints=(),
        student_preacts=tuple(student),
        teacher_preacts=tuple(teacher),
    )


def maps(shapes, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


STUDENT = maps([(4, 8, 8, 3), (4, 4, 4, 5)], 1)
TEACHER = maps([(4, 8, 8, 6), (4, 2, 2, 7)], 2)
OFD = ofd.OFD(ce_weight=1.0, weight=0.001, warmup_epochs=0.0)


@functools.cache
def variables():
    return tap_toys.variables(OFD, signals(STUDENT, TEACHER))


def value(params, student, teacher):
    made = {**variables(), "params": params}
    losses, new = OFD.apply(
        made, signals(student, teacher), train=True, mutable=["batch_stats"]
    )
    return method.total(losses), (losses, new["batch_stats"])


@functools.cache
def answer():
    """((total, (losses, statistics)), gradients)."""
    both = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
    return jax.device_get(jax.jit(both)(variables()["params"], STUDENT, TEACHER))


def test_values_by_hand():
    """Batch norm, margins and the partial distance by loops; stage 1 counts half."""
    made, ((_, (losses, _)), _) = variables(), answer()
    for k, (ours, theirs) in enumerate(zip(STUDENT, TEACHER, strict=True)):
        kernel = made["params"][f"module{k + 1}"]["connector"]["conv"]["kernel"][0, 0]
        x = np.asarray(ours, np.float64) @ np.asarray(kernel, np.float64)
        x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
        t = np.asarray(theirs, np.float64)
        if k:  # the student's 4x4 cells averaged to 2x2
            x = x.reshape(4, 2, 2, 2, 2, 7).mean((2, 4))
        wanted = 0.0
        for c in range(t.shape[-1]):
            margin = t[..., c][t[..., c] < 0].mean()
            for a, b in zip(x[..., c].ravel(), t[..., c].ravel(), strict=True):
                if b > 0 or (margin < b <= 0 and a > b):
                    wanted += (a - b) ** 2
                elif b <= margin and a > margin:
                    wanted += (a - margin) ** 2
        wanted /= 4 * (1 if k else 2)
        np.testing.assert_allclose(losses[k].terms["ofd"], wanted, rtol=1e-4)
        assert losses[k].weights["ofd"] == np.float32(0.001)
    assert list(losses[0].terms) == ["ofd"] and "head_ce" in losses[1].terms


def test_gradients_reach_student_and_connectors_and_not_the_teacher():
    _, grads = answer()
    params, student, teacher = (jax.tree.leaves(g) for g in grads)
    assert all(np.any(g) for g in params + student)
    assert not any(np.any(g) for g in teacher)


def test_bfloat16_gives_float32():
    """Maps of other sizes are averaged in their own type (`adapter.match_size`)."""
    halves = precision.halves((STUDENT, TEACHER))
    _, (losses, state) = jax.eval_shape(value, variables()["params"], *halves)
    for x in [loss.terms["ofd"] for loss in losses] + jax.tree.leaves(state):
        assert x.dtype == jnp.float32
    stats = variables()["batch_stats"]["module1"]["margin"]
    assert precision.arithmetic(step, stats, halves[1][0]) == {"float32"}
