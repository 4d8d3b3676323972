"""Overhaul: margins against the Gaussian formula, which stage counts how much."""

import functools

import jax
import numpy as np
import precision
import tap_toys
import toys
from scipy import stats

from lakd_jax.distill import ofd

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


STUDENT = toys.noise(1, 4, 8, 8, 3), toys.noise(2, 4, 4, 4, 5)
TEACHER = toys.noise(3, 4, 8, 8, 6), toys.noise(4, 4, 2, 2, 7)
OFD = ofd.OFD(ce_weight=1.0, weight=0.001, warmup_epochs=0.0)


def test_margins_of_bfloat16_responses_are_float32():
    _, state = learnt([TEACHER[0]])
    half = precision.halves(TEACHER[0])
    assert precision.arithmetic(step, state, half) == {"float32"}


def test_values_by_hand():
    """Batch norm, margins and the partial distance by loops; stage 1 counts half."""
    outputs = toys.outputs(np.zeros((4, 3), np.float32))
    seen = toys.signals(outputs, student_preacts=STUDENT, teacher_preacts=TEACHER)
    made = tap_toys.variables(OFD, seen)
    apply = functools.partial(OFD.apply, train=True, mutable=["batch_stats"])
    losses, _ = jax.jit(apply)(made, seen)
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
