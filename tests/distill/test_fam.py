"""FAM-KD: the public code's values, from weights made by name; a transform by loops."""

import cmath

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tap_toys
import toys

from lakd_jax.distill import fam

CUTOFF = 0.1


def filter_params(name, width, of, size):
    spectra = {}
    for ours, theirs in (("real", "real"), ("imaginary", "imag")):
        weight = golden_weights.tensor(
            f"{name}.weights1.{theirs}", (of, width, size, size)
        )
        spectra[ours] = weight.transpose(2, 3, 0, 1)
    return spectra | {
        "share_global": golden_weights.tensor(f"{name}.rate1", (1,))[0],
        "share_local": golden_weights.tensor(f"{name}.rate2", (1,))[0],
        "local": golden_weights.conv(f"{name}.w0", width, of, 1, 1)
        | golden_weights.bias(f"{name}.w0", width),
    }


def fusion_params(name, width):
    half = width // 2
    row = golden_weights.tensor(f"{name}.rel_h", (half, 1, 1, 3, 1))
    column = golden_weights.tensor(f"{name}.rel_w", (half, 1, 1, 1, 3))
    return {
        n: golden_weights.conv(f"{name}.{n}_conv", width, width, 1, 1)
        for n in ("query", "key", "value")
    } | {
        "row": row[:, 0, 0].transpose(1, 2, 0),
        "column": column[:, 0, 0].transpose(1, 2, 0),
    }


# Side -> sum of the outputs times random numbers, norms of the gradients of it for the
# input and for the filter: computed with the public code of FAM-KD. From 20 on there
# are frequencies that are dropped.
FILTERS = {
    4: (1.0400159, 0.60406208, 2.3503403),
    7: (1.0315332, 1.0334926, 4.4147983),
    20: (-2.4499235, 3.0467312, 12.888931),
}


@pytest.mark.parametrize("side", FILTERS)
def test_the_filter_is_the_public_one(side):
    x, weights = toys.noise(11, 2, side, side, 4), toys.noise(12, 2, side, side, 6)
    module = fam.Filter(6, CUTOFF)

    def loss(params, x):
        return jnp.sum(weights * module.apply({"params": params}, x))

    params = filter_params("filter", 6, 4, side)
    value, (ours, own) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    spectrum = np.hypot(ours["real"], ours["imaginary"])
    got = value, np.linalg.norm(own), np.linalg.norm(spectrum)
    np.testing.assert_allclose(got, FILTERS[side], rtol=1e-4)


# Channels -> the same for the fusion of two maps.
FUSIONS = {
    4: (0.26141489, 4.9971113, 1.4290712),
    8: (-2.1309137, 5.6076179, 3.5023033),
}


@pytest.mark.parametrize("width", FUSIONS)
def test_the_fusion_is_the_public_one(width):
    x, queries, weights = (toys.noise(seed, 2, 5, 5, width) for seed in (13, 14, 15))

    def loss(x, queries):
        params = fusion_params("fusion", width)
        return jnp.sum(weights * fam.Fusion().apply({"params": params}, x, queries))

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, queries)
    got = value, *map(np.linalg.norm, map(np.ravel, grads))
    np.testing.assert_allclose(got, FUSIONS[width], rtol=1e-4)


SIDES, WIDTHS, TEACHERS = (8, 4, 1), (4, 8, 8), (6, 10, 10)
STUDENT = [
    toys.noise(20 + i, 4, n, n, c)
    for i, (n, c) in enumerate(zip(SIDES, WIDTHS, strict=True))
]
TEACHER = [
    np.maximum(toys.noise(30 + i, 4, n, n, c), 0)
    for i, (n, c) in enumerate(zip(SIDES, TEACHERS, strict=True))
]


def level_params(k):
    name, width, of = f"level{k + 1}", WIDTHS[k], TEACHERS[k]
    own = {
        "filter": filter_params(f"{name}.conv2.0", of, width, SIDES[k]),
        "norm": golden_weights.norm(f"{name}.conv2.1", of),
    }
    if k < 2:
        own["fusion"] = fusion_params(f"{name}.att_conv", width)
    if k == 0:
        narrow = f"{name}.conv1"
        own["narrow"] = {
            "conv": golden_weights.conv(f"{narrow}.0", 4, 8, 1, 1),
            "bn": golden_weights.norm(f"{narrow}.1", 4),
        }
    return own


def pyramid(student, teacher):
    filtered, deeper = [], None
    for k in (2, 1, 0):
        level = fam.Level(teacher[k].shape[-1], CUTOFF)
        args = (student[k], deeper, teacher[k].shape[1:3])
        stats = tap_toys.variables(level, *args)["batch_stats"]
        variables = {"params": level_params(k), "batch_stats": stats}
        (out, deeper), _ = level.apply(
            variables, *args, train=True, mutable=["batch_stats"]
        )
        filtered.insert(0, out)
    return fam.feature_loss(filtered, teacher)


def test_the_whole_is_the_public_one():
    """Two stages and pooled features of other widths than the teacher's."""
    value, grads = jax.jit(jax.value_and_grad(pyramid))(STUDENT, TEACHER)
    got = value, *map(np.linalg.norm, map(np.ravel, grads))
    public = 1.9219782, 0.028090676, 0.047711812, 0.26308125
    np.testing.assert_allclose(got, public, rtol=1e-4)


def test_the_global_branch_by_loops():
    """Every frequency by the definition of the discrete transform, sizes 3 and 2."""
    x, (rows, columns) = np.asarray(toys.noise(40, 1, 3, 2, 1), np.float64), (3, 2)
    real, imaginary = (np.asarray(toys.noise(seed, 3, 2, 1, 1)) for seed in (41, 42))
    wanted = np.zeros((rows, columns))
    for u in range(rows):
        for v in range(columns):
            found = 0
            for i in range(rows):
                for j in range(columns):
                    turn = cmath.exp(-2j * cmath.pi * (u * i / rows + v * j / columns))
                    found += x[0, i, j, 0] * turn
            found *= complex(real[u, v, 0, 0], imaginary[u, v, 0, 0])
            for i in range(rows):
                for j in range(columns):
                    turn = cmath.exp(2j * cmath.pi * (u * i / rows + v * j / columns))
                    wanted[i, j] += (found * turn).real / (rows * columns)
    params = {
        "real": real,
        "imaginary": imaginary,
        "share_global": 2.0,
        "share_local": 0.0,
        "local": {"kernel": np.ones((1, 1, 1, 1)), "bias": np.zeros(1)},
    }
    apply = jax.jit(fam.Filter(1, CUTOFF).apply)
    got = apply({"params": params}, x.astype(np.float32))
    np.testing.assert_allclose(got[0, ..., 0], 2 * wanted, rtol=1e-4, atol=1e-5)


def test_only_the_lowest_frequencies_are_dropped():
    passed = jax.jit(
        lambda: (
            [fam.high_pass(20, 40, CUTOFF), fam.high_pass(16, 7, CUTOFF)]
            + [fam.high_pass(8, 8, 1.0)]
        )
    )
    kept, small, none = map(np.asarray, passed())
    low = [(u, v) for u in (-1, 0) for v in (-2, -1, 0, 1)]
    assert sorted((u % 20, v % 40) for u, v in low) == sorted(
        zip(*map(np.ndarray.tolist, np.nonzero(kept == 0)), strict=True)
    )
    assert np.all(small == 1) and not np.any(none)


def test_an_odd_number_of_channels_is_fused():
    x, queries = toys.noise(50, 2, 4, 4, 5), toys.noise(51, 2, 4, 4, 5)
    fuse = jax.jit(fam.Fusion().init_with_output)
    out, _ = fuse(jax.random.key(0), x, queries)
    assert out.shape == x.shape and np.all(np.isfinite(out))
