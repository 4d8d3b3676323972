"""Tests knowledge points against the authors' code, and against hand-made grids."""

import functools

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lakd_jax.explain import entropy, points

with np.load(golden_weights.FOLDER / "points.npz") as _file:
    GOLDEN = dict(_file)
CLOSE = 1e-5  # relative, of the public code's float32

# ------------------------------------------------------------------ the entropy


def features(variables, x):
    """The network of the golden values: convolution, ReLU, pooling."""
    x = jax.lax.conv_general_dilated(
        x,
        variables["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x + variables["bias"][None, None, None])
    return nn.max_pool(x, (2, 2), (2, 2))


def nhwc(name):
    return jnp.moveaxis(jnp.asarray(GOLDEN[f"inputs/{name}"]), -3, -1)


VARIABLES = golden_weights.conv("kq.0", 8, 3, 3, 3) | golden_weights.bias("kq.0", 8)
CASES = {
    "l7": entropy.Settings(rounds=20, check_after=15, weight=7.0),
    "l14": entropy.Settings(rounds=20, check_after=15, weight=14.0),
    "clamp": entropy.Settings(rounds=20, check_after=0, weight=7.0, learning_rate=0.05),
}


@functools.cache
def fitted(case):
    initial, later = nhwc("kq_noise_init"), nhwc("kq_noise")

    def noise(i):
        return initial if isinstance(i, int) else later[i % len(later)]

    image = nhwc("kq_image")[0]

    def run():
        return entropy.fit(features, VARIABLES, image, noise, CASES[case])

    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(run)())


@pytest.mark.parametrize("case", CASES)
def test_the_noise_is_the_authors(case):
    found, key = fitted(case), f"kq/{case}"
    steps = int(GOLDEN[f"{key}/steps"])
    assert found["rounds"] == steps
    assert found["round"] == GOLDEN[f"{key}/best_index"]
    assert found["weight"] == pytest.approx(float(GOLDEN[f"{key}/last_lambda"]))
    np.testing.assert_allclose(found["scale"], GOLDEN["kq/sigma_f"], rtol=CLOSE)
    for name, golden in (
        (found["sigma"], GOLDEN[f"{key}/best_sigma"]),
        (found["entropies"][:steps], GOLDEN[f"{key}/entropy"][:steps]),
        (found["errors"][:steps], GOLDEN[f"{key}/feature_loss"][:steps]),
    ):
        assert golden_weights.distance(name, golden) < CLOSE


def test_the_weight_is_raised_only_where_the_target_was_not_passed():
    assert fitted("l7")["weight"] > CASES["l7"].weight
    assert fitted("l14")["rounds"] < CASES["l14"].rounds


def test_cells_are_the_nearest_ones():
    grid = jnp.arange(256.0).reshape(16, 16)
    repeated = np.repeat(np.repeat(grid, 2, 0), 2, 1)
    np.testing.assert_array_equal(entropy.enlarged(grid, 32, 32)[..., 0], repeated)
    at = np.arange(20) * 16 // 20
    uneven = entropy.enlarged(grid, 20, 20)[..., 0]
    np.testing.assert_array_equal(uneven, np.asarray(grid)[at][:, at])
    assert (entropy.cells(8), entropy.cells(227)) == (8, 16)


def left_half(variables, x):
    """A feature that depends on the left half of the image only."""
    return variables["scale"] * x[:, :, : x.shape[2] // 2]


@pytest.fixture(scope="module")
def fitter_results():
    images = 1 + np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    settings = entropy.Settings(rounds=12, draws=64, check_after=9, weight=7.0)
    checks = []

    def run(together, scale):
        fitter = entropy.Fitter(left_half, images, settings)
        fitter._together = together
        return fitter({"scale": jnp.float32(scale)}, lambda: checks.append(1))

    return run(3, 1.0), run(2, 1.0), run(3, 0.0), checks


def test_entropy_is_lower_where_the_network_looks(fitter_results):
    together, _, _, checks = fitter_results
    assert together.grids.shape == (3, 8, 8)
    left, right = together.grids[..., :4], together.grids[..., 4:]
    assert left.max() < right.min()
    assert len(checks) == 1 + 2 + 1


def test_images_do_not_depend_on_the_others_in_their_program(fitter_results):
    together, two_by_two, *_ = fitter_results
    np.testing.assert_allclose(two_by_two.sigma, together.sigma, rtol=1e-5)
    assert np.abs(together.sigma[0] - together.sigma[1]).max() > 1e-4


def test_a_network_that_ignores_the_image_has_no_scale(fitter_results):
    together, _, constant, _ = fitter_results
    assert np.all(together.scale > 0) and not constant.scale.any()
    assert np.isfinite(constant.sigma).all()


# ------------------------------------------------------------------ the points


def golden_points():
    grids = entropy.entropy(GOLDEN["inputs/kq_sigma_maps"].astype(np.float64))
    return points.count(grids, np.broadcast_to(points.central(16), (6, 16, 16)))


def test_points_are_the_authors():
    found = golden_points()
    np.testing.assert_allclose(
        found.background, GOLDEN["kq/measures/background_mean"], rtol=CLOSE
    )
    np.testing.assert_array_equal(found.on_foreground, GOLDEN["kq/measures/n_fg"])
    np.testing.assert_array_equal(found.on_background, GOLDEN["kq/measures/n_bg"])
    np.testing.assert_allclose(found.ratio, GOLDEN["kq/measures/ratio"], rtol=1e-6)


def test_learning_order_and_stability_are_the_authors():
    found, epochs = golden_points(), GOLDEN["inputs/kq_checkpoints"]
    distance = np.cumsum(GOLDEN["inputs/kq_weight_diff"])[epochs]
    when = found.when(distance)
    assert when.mean() == pytest.approx(float(GOLDEN["kq/measures/d_mean"]), rel=1e-6)
    assert when.std() == pytest.approx(float(GOLDEN["kq/measures/d_std"]), rel=1e-6)
    rho = float(GOLDEN["kq/measures/rho_fg"])
    assert found.stability == pytest.approx(rho, rel=1e-6)


def test_points_by_hand():
    """One image, a 4x4 grid, the middle 2x2 is the object; two checkpoints."""
    inside = points.central(4)
    assert inside.sum() == 4 and inside[1:3, 1:3].all()
    first, last = np.zeros((4, 4)), np.zeros((4, 4))
    first[1, 1] = first[1, 2] = last[2, 2] = -1.0
    last[0, 0] = -12.0  # of twelve cells outside, so that their mean is -1
    found = points.count(np.stack([first, last])[None], inside[None])
    np.testing.assert_allclose(found.background, [0.0, -1.0])
    assert found.on_foreground.tolist() == [[2, 0]]  # -1 is the mean, no point
    assert found.on_background.tolist() == [[0, 1]]
    assert found.ratio.tolist() == [[1.0, 0.0]]
    assert found.stability == 0.0
    assert found.when(np.array([0.5, 2.0])).tolist() == [0.5]
    assert points.usable(found.grids, inside[None]).tolist() == [False]
    assert points.usable(found.grids[:, :1], inside[None]).tolist() == [True]
