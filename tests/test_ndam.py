"""The teacher's mask: values by hand and the properties it must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax.distill import adapter, lakd, ndam

DEFAULT = {"f_sum": "abs", "a": 0.5, "b": 0.5, "window": 3, "stride": 1}


def features(shape=(2, 6, 5, 3), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def mask(x, kind="mean", **changes):
    return ndam.mask(x, **(DEFAULT | changes), kind=kind)


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
    x = jnp.array([1.0, -2.0, 3.0]).reshape(1, 1, 1, 3)
    got = {k: float(ndam.attention_map(x, k).item()) for k in ndam.F_SUMS}
    assert got == {"abs": 6.0, "signed": 2.0, "square": 14.0}


def test_attention_map_of_zero_has_zero_gradient():
    grad = jax.grad(lambda x: ndam.attention_map(x, "abs").sum())(
        jnp.zeros((1, 1, 1, 2))
    )
    assert not grad.any()


@pytest.mark.parametrize("kind", ["mean", "l2", "max", "none"])
def test_property_07_mask_is_not_negative(kind):
    assert (mask(features(), kind) >= 0).all()


def test_property_07_mean_of_the_mask_is_one():
    means = jnp.mean(mask(features((4, 8, 8, 16))), axis=(1, 2, 3))
    np.testing.assert_allclose(means, 1, atol=1e-5)


@pytest.mark.parametrize("window,stride", [(3, 1), (2, 2), (3, 2), (0, 1), (0, 4)])
def test_property_07_constant_map_gives_mask_one_up_to_the_borders(window, stride):
    v = jnp.full((2, 7, 9, 4), 2.0)
    w = mask(v, window=window, stride=stride)
    assert w.shape == (2, 7, 9, 1)
    np.testing.assert_array_equal(w, 1)
    u = features((2, 7, 9, 4))
    for power in ("2", "1"):
        got = lakd.attention_loss(u, v, w, power, "mean")
        assert got == lakd.feature_loss(u, v, "mean")
    got = lakd.attention_loss(u, v, w, "softmax", "mean")
    assert got == pytest.approx(float(lakd.feature_loss(u, v, "mean")), rel=1e-5)


def test_property_08_average_and_maximum_against_a_loop():
    s = ndam.attention_map(features(), "abs")
    average = ndam.pooled_map(s, 1.0, 0.0, 3, 1)
    maximum = ndam.pooled_map(s, 0.0, 1.0, 3, 1)
    np.testing.assert_allclose(average, window_loop(s, np.mean), rtol=1e-6)
    np.testing.assert_array_equal(maximum, window_loop(s, np.max))
    both = ndam.pooled_map(s, 0.3, 2.0, 3, 1)
    np.testing.assert_allclose(both, 0.3 * average + 2 * maximum, rtol=1e-6)


def test_property_08_maximum_of_negative_maps_ignores_the_padding():
    s = -1.0 - jnp.abs(features((1, 4, 4, 1)))
    got = ndam.pooled_map(s, 0.0, 1.0, 3, 1)
    np.testing.assert_array_equal(got, window_loop(s, np.max))


def test_strided_and_global_pooling_by_hand():
    s = jnp.arange(9.0).reshape(1, 3, 3, 1)
    coarse = ndam.pooled_map(s, 1.0, 0.0, 2, 2)[0, :, :, 0]
    np.testing.assert_allclose(coarse, [[2, 2, 3.5], [2, 2, 3.5], [6.5, 6.5, 8]])
    np.testing.assert_allclose(ndam.pooled_map(s, 1.0, 0.0, 0, 1), 4)
    np.testing.assert_allclose(ndam.pooled_map(s, 0.0, 1.0, 0, 1), 8)
    grid = ndam.pooled_map(s, 0.0, 1.0, 0, 2)[0, :, :, 0]
    # Cells 0..1 and 1..2 overlap; rows 0 and 1 take the first.
    np.testing.assert_allclose(grid, [[4, 4, 5], [4, 4, 5], [7, 7, 8]])


def test_normalise_by_hand():
    w = jnp.array([3.0, 4.0, 0.0, 5.0]).reshape(1, 2, 2, 1)
    flat = {k: np.ravel(ndam.normalise(w, k)) for k in ndam.NORMALISATIONS}
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
        np.testing.assert_allclose(mask(scale * x, kind), w, rtol=1e-4)
    np.testing.assert_allclose(mask(x[..., ::-1], kind), w, rtol=1e-6)
    flipped = mask(x[:, :, ::-1], kind)
    np.testing.assert_allclose(flipped, w[:, :, ::-1], rtol=1e-6)


def test_property_10_signed_features_and_zero_maps():
    x = features()
    signed = jnp.abs(ndam.attention_map(x, "signed"))
    assert (ndam.attention_map(x, "abs") > signed).any()
    positive = jnp.abs(x)
    np.testing.assert_allclose(
        mask(positive), mask(positive, f_sum="signed"), rtol=1e-6
    )

    def loss(u, kind):
        w = mask(jnp.zeros_like(x), kind)
        return lakd.attention_loss(u, jnp.zeros_like(x), w, "2", "mean")

    for kind in ndam.NORMALISATIONS:
        value, grad = jax.value_and_grad(loss)(x, kind)
        assert jnp.isfinite(value) and jnp.isfinite(grad).all()
    value, grad = jax.value_and_grad(lakd.map_loss)(
        jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 1))
    )
    assert value == 0 and not grad.any()


@pytest.mark.parametrize("power", ["2", "1", "softmax"])
def test_property_11_no_gradient_reaches_the_teacher(power):
    def loss(v):
        return lakd.attention_loss(features(), v, mask(v), power, "mean")

    assert not jax.grad(loss)(features(seed=1)).any()
    assert not jax.grad(lambda v: mask(v).sum())(features()).any()


def test_mask_is_float32_under_jit_and_bfloat16():
    x = features().astype(jnp.bfloat16)
    got = jax.jit(mask)(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, mask(x.astype(jnp.float32)), rtol=1e-6)


def test_student_map_gradient_by_finite_differences():
    x, way = features((2, 4, 4, 3)), features((2, 4, 4, 3), seed=1)
    teacher = ndam.attention_map(features((2, 4, 4, 3), seed=2), "abs")

    def loss(x):
        s = ndam.activation_map(x, **(DEFAULT | {"f_sum": "square"}), kind="none")
        return lakd.map_loss(s, teacher)

    step = 1e-3
    slope = (loss(x + step * way) - loss(x - step * way)) / (2 * step)
    assert jnp.vdot(jax.grad(loss)(x), way) == pytest.approx(float(slope), rel=1e-2)


def test_match_size_pools_the_larger_one_like_adaptive_average_pooling():
    u, v = features((1, 5, 4, 2)), features((1, 3, 8, 6))
    small_u, small_v = adapter.match_size(u, v)
    assert small_u.shape == (1, 3, 4, 2) and small_v.shape == (1, 3, 4, 6)
    # Cells of 5 rows pooled to 3: 0..1, 1..3, 3..4.
    rows = [u[:, 0:2].mean(1), u[:, 1:4].mean(1), u[:, 3:5].mean(1)]
    np.testing.assert_allclose(small_u, jnp.stack(rows, 1), rtol=1e-5, atol=1e-6)
    pairs = v.reshape(1, 3, 4, 2, 6).mean(3)
    np.testing.assert_allclose(small_v, pairs, rtol=1e-5, atol=1e-6)


def test_match_size_leaves_equal_sizes_alone():
    u, v = features((1, 4, 4, 2)), features((1, 4, 4, 6))
    got = adapter.match_size(u, v)
    np.testing.assert_array_equal(got[0], u)
    np.testing.assert_array_equal(got[1], v)


def test_resize_like_repeats_or_averages():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    big = adapter.resize_like(x, jnp.zeros((1, 4, 4, 7)))[0, :, :, 0]
    np.testing.assert_array_equal(big, np.kron([[0, 1], [2, 3]], np.ones((2, 2))))
    small = adapter.resize_like(x, jnp.zeros((1, 1, 1, 7)))
    np.testing.assert_allclose(small, 1.5)


def test_adapter_second_pass_keeps_statistics():
    module = adapter.Adapter(5)
    x = features()
    variables = module.init(jax.random.key(0), x, train=True)
    assert set(variables["params"]) == {"conv", "bn"}
    assert "bias" not in variables["params"]["conv"]

    def twice(module, x):
        first = module(x, train=True)
        return first, adapter.again(module, x, train=True)

    (first, second), new = module.apply(
        variables, x, mutable=["batch_stats"], method=twice
    )
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    _, once = module.apply(variables, x, train=True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, new, once)
