"""The teacher's mask: values by hand and the properties it must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
import tap_toys
import toys

from lakd_jax.distill import lakd, ndam
from lakd_jax.distill.base import adapter


def features(shape=(2, 6, 5, 3), seed=0):
    return toys.noise(seed, *shape)


@functools.partial(jax.jit, static_argnums=1)
def jitted(x, options):
    return options.mask(x)


def mask(x, kind="mean", **changes):
    return np.asarray(jitted(x, lakd.Options(normalise=kind, **changes)))


attention_map = jax.jit(ndam.attention_map, static_argnums=1)
pooled_map = jax.jit(ndam.pooled_map, static_argnums=(1, 2, 3, 4))
attention_loss = jax.jit(lakd.attention_loss, static_argnums=(3, 4))
feature_loss = jax.jit(lakd.feature_loss, static_argnums=2)


def window_loop(s, reduce):
    """3x3 windows over the real pixels of (B, H, W, 1), by a plain loop."""
    s = np.asarray(s)
    out = np.empty_like(s)
    for y in range(s.shape[1]):
        for x in range(s.shape[2]):
            near = s[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            out[:, y, x] = reduce(near, axis=(1, 2))
    return out


def test_attention_map_by_hand():
    x = np.array([1.0, -2.0, 3.0]).reshape(1, 1, 1, 3)
    got = {k: float(attention_map(x, k).item()) for k in ndam.F_SUMS}
    assert got == {"abs": 6.0, "signed": 2.0, "square": 14.0}


def test_attention_map_of_zero_has_zero_gradient():
    slope = jax.jit(jax.grad(lambda x: ndam.attention_map(x, "abs").sum()))
    assert not np.any(slope(np.zeros((1, 1, 1, 2), np.float32)))


@pytest.mark.parametrize("kind", ndam.NORMALISATIONS)
def test_mask_is_the_normalised_pooled_map(kind):
    pooled = pooled_map(attention_map(features(), "abs"), 0.3, 2.0, 5, 2)
    got = mask(features(), kind, a=0.3, b=2.0, window=5, stride=2)
    np.testing.assert_allclose(got, ndam.normalise(pooled, kind), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "l2", "max", "none"])
def test_property_07_mask_is_not_negative(kind):
    assert (mask(features(), kind) >= 0).all()


def test_property_07_mean_of_the_mask_is_one():
    means = np.mean(mask(features((4, 8, 8, 16))), axis=(1, 2, 3))
    np.testing.assert_allclose(means, 1, atol=1e-5)


@pytest.mark.parametrize("window,stride", [(3, 1), (2, 2), (3, 2), (0, 1), (0, 4)])
def test_property_07_constant_map_gives_mask_one_up_to_the_borders(window, stride):
    v = np.full((2, 7, 9, 4), 2.0, np.float32)
    w = mask(v, window=window, stride=stride)
    assert w.shape == (2, 7, 9, 1)
    np.testing.assert_array_equal(w, 1)


def test_property_07_mask_of_one_leaves_the_plain_distance():
    u, v = features((2, 7, 9, 4)), np.full((2, 7, 9, 4), 2.0, np.float32)
    plain, w = feature_loss(u, v, "mean"), np.ones((2, 7, 9, 1), np.float32)
    for power in ("2", "1"):
        assert attention_loss(u, v, w, power, "mean") == plain
    got = attention_loss(u, v, w, "softmax", "mean")
    assert got == pytest.approx(float(plain), rel=1e-5)


def test_property_08_average_and_maximum_against_a_loop():
    s = np.abs(features()).sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_map(features(), "abs"), s, rtol=1e-6)
    average = np.asarray(pooled_map(s, 1.0, 0.0, 3, 1))
    maximum = np.asarray(pooled_map(s, 0.0, 1.0, 3, 1))
    np.testing.assert_allclose(average, window_loop(s, np.mean), rtol=1e-6)
    np.testing.assert_array_equal(maximum, window_loop(s, np.max))
    both = pooled_map(s, 0.3, 2.0, 3, 1)
    np.testing.assert_allclose(both, 0.3 * average + 2 * maximum, rtol=1e-6)


def test_property_08_maximum_of_negative_maps_ignores_the_padding():
    s = -1.0 - np.abs(features((2, 6, 5, 1)))
    got = pooled_map(s, 0.0, 1.0, 3, 1)
    np.testing.assert_array_equal(got, window_loop(s, np.max))


def test_strided_and_global_pooling_by_hand():
    s = np.arange(9.0).reshape(1, 3, 3, 1)
    coarse = pooled_map(s, 1.0, 0.0, 2, 2)[0, :, :, 0]
    np.testing.assert_allclose(coarse, [[2, 2, 3.5], [2, 2, 3.5], [6.5, 6.5, 8]])
    np.testing.assert_allclose(pooled_map(s, 1.0, 0.0, 0, 1), 4)
    np.testing.assert_allclose(pooled_map(s, 0.0, 1.0, 0, 1), 8)
    grid = pooled_map(s, 0.0, 1.0, 0, 2)[0, :, :, 0]
    # Cells 0..1 and 1..2 overlap; rows 0 and 1 take the first.
    np.testing.assert_allclose(grid, [[4, 4, 5], [4, 4, 5], [7, 7, 8]])


def test_normalise_by_hand():
    w = np.array([3.0, 4.0, 0.0, 5.0]).reshape(1, 2, 2, 1)
    kinds = ndam.NORMALISATIONS
    found = jax.jit(lambda w: [ndam.normalise(w, k) for k in kinds])(w)
    flat = {k: np.ravel(x) for k, x in zip(kinds, found, strict=True)}
    np.testing.assert_allclose(flat["mean"], [1, 4 / 3, 0, 5 / 3], rtol=1e-6)
    np.testing.assert_allclose(flat["l2"], np.ravel(w) / np.sqrt(50), rtol=1e-6)
    np.testing.assert_allclose(flat["max"], [0.6, 0.8, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(flat["sigmoid"][2], 0.5)
    np.testing.assert_array_equal(flat["none"], np.ravel(w))


@pytest.mark.parametrize("kind", ["mean", "l2", "max"])
def test_property_09_mask_invariances(kind):
    x = features()
    w = mask(x, kind)
    for scale in (1e-3, 7.0, 1e3):
        np.testing.assert_allclose(mask(np.float32(scale) * x, kind), w, rtol=1e-4)
    np.testing.assert_allclose(mask(x[..., ::-1], kind), w, rtol=1e-6)
    flipped = mask(x[:, :, ::-1], kind)
    np.testing.assert_allclose(flipped, w[:, :, ::-1], rtol=1e-6)


def test_property_10_signed_features():
    x = features()
    signed = np.abs(attention_map(x, "signed"))
    assert np.any(attention_map(x, "abs") > signed)
    positive = np.abs(x)
    np.testing.assert_allclose(
        mask(positive), mask(positive, f_sum="signed"), rtol=1e-6
    )


def test_mask_is_float32_under_jit_and_bfloat16():
    x = features()
    half = jnp.asarray(x, jnp.bfloat16)
    assert precision.arithmetic(lakd.Options().mask, half) == {"float32"}
    np.testing.assert_allclose(mask(half), mask(half.astype(np.float32)), rtol=1e-6)


def test_match_size_pools_the_larger_one_like_adaptive_average_pooling():
    u, v = features((1, 5, 4, 2)), features((1, 3, 8, 6))
    small_u, small_v = jax.jit(adapter.match_size)(u, v)
    assert small_u.shape == (1, 3, 4, 2) and small_v.shape == (1, 3, 4, 6)
    # Cells of 5 rows pooled to 3: 0..1, 1..3, 3..4.
    rows = [u[:, 0:2].mean(1), u[:, 1:4].mean(1), u[:, 3:5].mean(1)]
    np.testing.assert_allclose(small_u, np.stack(rows, 1), rtol=1e-5, atol=1e-6)
    pairs = v.reshape(1, 3, 4, 2, 6).mean(3)
    np.testing.assert_allclose(small_v, pairs, rtol=1e-5, atol=1e-6)


def test_resize_like_repeats_or_averages():
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    resize = jax.jit(adapter.resize_like)
    big = resize(x, np.zeros((1, 4, 4, 7)))[0, :, :, 0]
    np.testing.assert_array_equal(big, np.kron([[0, 1], [2, 3]], np.ones((2, 2))))
    small = resize(x, np.zeros((1, 1, 1, 7)))
    np.testing.assert_allclose(small, 1.5)


def test_adaptive_pool_averages_cells_and_repeats_pixels():
    x = features((2, 32, 32, 3))
    small, line = x[:, :8, :8], np.arange(4.0)[None, :, None, None] * np.ones((4, 1))

    @jax.jit
    def pooled(x, small, line):
        pool = functools.partial(ndam.adaptive_pool, reduce=jnp.mean)
        return pool(x, 8, 8), pool(small, 32, 32), pool(line, 7, 7), pool(line, 8, 2)

    eighth, grown, uneven, doubled = pooled(x, small, line)
    means = x.reshape(2, 8, 4, 8, 4, 3).mean((2, 4))
    np.testing.assert_allclose(eighth, means, atol=1e-6)
    np.testing.assert_array_equal(grown, small.repeat(4, 1).repeat(4, 2))
    np.testing.assert_allclose(uneven[0, :, 0, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(doubled[0, :, 0, 0], np.arange(4).repeat(2))


def test_adapter_second_pass_keeps_statistics():
    module = adapter.Adapter(5)
    x = features()
    variables = tap_toys.variables(module, x)
    assert set(variables["params"]) == {"conv", "bn"}
    assert "bias" not in variables["params"]["conv"]

    def twice(module, x):
        first = module(x, train=True)
        return first, adapter.again(module, x, train=True)

    @jax.jit
    def run(variables, x):
        apply = functools.partial(module.apply, variables, x, mutable=["batch_stats"])
        return apply(method=twice), apply(train=True)

    ((first, second), new), (_, once) = run(variables, x)
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new, once)
