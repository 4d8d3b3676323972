"""Tests policies, jitter and erasing: values, shares, and what they depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_step as steps
import tiny

from lakd_jax.config import check
from lakd_jax.data import distortion, operations, policy

MEAN = (0.485, 0.456, 0.406)
EVERYTHING = {"jitter": 0.4, "policy": "trivial", "erase": 0.5}


def images(count, side=8):
    shape = (count, side, side, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def values(name, level, negative, sides=(20, 10)):
    """Returns {operation: value} of a policy at a level; operations once each."""
    made = policy.create(name, MEAN)
    rows = range(len(made.rows))
    found = [float(made.value(row, level, negative, sides)) for row in rows]
    assert len({row.operation for row in made.rows}) == len(made.rows)
    return {row.operation: v for row, v in zip(made.rows, found, strict=True)}


# From torchvision's TrivialAugmentWide, timm's rand_augment_ops, MLKD's augment_list.
@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        (
            "trivial",
            20 / 30,
            {
                "shear_x": -0.66,
                "translate_y": -21.0,
                "rotate": -90.0,
                "brightness": 0.34,
                "posterize": 4.0,
                "solarize": 85.0,
            },
        ),
        ("trivial", 1.0, {"posterize": 2.0, "solarize": 0.0, "translate_x": -32.0}),
        (
            "rand-2-9",
            0.9,
            {
                "rotate": -27.0,
                "posterize": 1.0,
                "solarize": 26.0,
                "solarize_add": 99.0,
                "sharpness": 0.19,
                "shear_y": -0.27,
                "translate_x": -8.1,
                "translate_y": -4.05,
            },
        ),
        (
            "fixmatch",
            0.25,
            {
                "colour": 0.275,
                "posterize": 5.0,
                "rotate": -15.0,
                "shear_x": -0.15,
                "solarize": 64.0,
                "translate_x": -3.0,
                "translate_y": -1.5,
            },
        ),
    ],
)
def test_values_are_the_sources(name, level, expected):
    found = values(name, level, negative=True)
    for operation, value in expected.items():
        assert found[operation] == pytest.approx(value, abs=1e-4), operation
    other = values(name, level, negative=False)
    flipped = {n for n in found if found[n] != other[n]}
    signed = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    signed |= set(operations._BLENDS)
    assert flipped == (set() if name == "fixmatch" else signed)


def test_sizes_of_the_policies():
    sizes = {n: len(policy.create(n, MEAN).rows) for n in ("trivial", "fixmatch")}
    assert sizes == {"trivial": 14, "fixmatch": 14}
    rand = policy.create("rand-3-10", MEAN)
    assert (len(rand.rows), rand.count, rand.level) == (15, 3, 10)
    assert rand.fill == (124, 116, 104) and rand.bicubic


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("trivail", "data.policy is 'trivail'; did you mean 'trivial'"),
        ("rand-0-9", "N operations, from 1 to 9"),
        ("rand-2-11", "such as rand-2-9"),
    ],
)
def test_names_of_policies_are_checked(value, line, tmp_path):
    (found,) = check.problems(tiny.config(tmp_path, data__policy=value), 1)
    assert line in found
    for name in ("", "trivial", "fixmatch", "rand-1-10"):
        assert not check.problems(tiny.config(tmp_path, data__policy=name), 1)


@functools.cache
def everything():
    return jax.jit(distortion.Distortion(**EVERYTHING))


def test_it_depends_on_seed_view_and_example_alone():
    run, key, ids = everything(), jax.random.key(3), jnp.array([4, 900_000, 31])
    together = run(key, images(3), ids, 6)
    assert together.shape == (3, 8, 8, 3)
    order = jnp.array([2, 0, 1])
    np.testing.assert_array_equal(
        run(key, images(3)[order], ids[order], 6), together[order]
    )
    for other in (
        run(key, images(3), ids, 7),
        run(jax.random.key(4), images(3), ids, 6),
        run(key, images(3), ids + 1, 6),
    ):
        assert not np.array_equal(other, together)


def test_each_image_of_a_batch_may_have_a_view_of_its_own():
    """As when a teacher's outputs are stored: the bits are those of a batch's step."""
    key, ids = jax.random.key(3), jnp.array([4, 900_000, 31])

    def one(image, example, view):
        return everything()(key, image[None], example[None], view)[0]

    apart = jax.jit(jax.vmap(one))(images(3), ids, jnp.full(3, 6))
    np.testing.assert_array_equal(apart, everything()(key, images(3), ids, 6))


def test_nothing_is_done_by_default():
    given = images(2)
    plain = distortion.Distortion()
    assert plain(jax.random.key(0), given, jnp.arange(2), 0) is given


def test_a_policy_draws_all_of_its_operations(monkeypatch):
    """Of the 14 in turn, at all levels; both signs."""
    monkeypatch.setattr(
        operations,
        "apply",
        lambda image, operation, value, **_: jnp.stack([operation, value]),
    )
    made = policy.create("trivial", MEAN)
    keys = jax.random.split(jax.random.key(0), 2000)
    image = jnp.zeros((8, 8, 3), jnp.uint8)
    seen = np.asarray(jax.jit(jax.vmap(lambda key: made._operate(key, image)))(keys))
    numbers, counts = np.unique(seen[:, 0], return_counts=True)
    names = {operations.OPERATIONS[int(n)] for n in numbers}
    assert names == {row.operation for row in made.rows}
    assert np.all(np.abs(counts / 2000 - 1 / 14) < 0.03)
    shears = seen[seen[:, 0] == operations.OPERATIONS.index("shear_x"), 1]
    assert shears.min() < -0.8 and shears.max() > 0.8
    assert len(np.unique(np.abs(shears).round(4))) > 20


def test_boxes_are_erased_with_noise():
    count = 600
    run = jax.jit(distortion.Distortion(erase=0.25, mean=MEAN, std=(0.2,) * 3))
    given = np.full((count, 16, 16, 3), 10, np.uint8)
    found = np.asarray(run(jax.random.key(0), given, jnp.arange(count), 0))
    assert found.dtype == np.float32
    changed = (found != 10).all(-1)
    assert np.array_equal(changed, (found != 10).any(-1))
    hit = changed.any((1, 2))
    assert np.mean(hit) == pytest.approx(0.25, abs=0.05)
    shares = changed[hit].mean((1, 2))
    assert 0.01 < shares.min() and shares.max() < 0.36
    for one in changed[hit]:
        rows, columns = one.any(1), one.any(0)
        assert np.array_equal(one, rows[:, None] & columns)  # a box
    noise = (found[changed] / 255 - np.array(MEAN)) / 0.2
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.05)


def test_jitter_is_within_its_bounds():
    """A grey image has no colour and its own mean: only its brightness can change."""
    count = 300
    run = jax.jit(distortion.Distortion(jitter=0.4))
    given = np.full((count, 4, 4, 3), 100, np.uint8)
    found = np.asarray(run(jax.random.key(0), given, jnp.arange(count), 0), int)
    assert np.ptp(found, (1, 2, 3)).max() == 0
    tones = found[:, 0, 0, 0]
    assert 59 <= tones.min() < 65 and 135 < tones.max() <= 140
    coloured = np.asarray(run(jax.random.key(0), images(8), jnp.arange(8), 0), int)
    assert (np.ptp(coloured, -1) != np.ptp(images(8).astype(int), -1)).any()


def test_a_grey_square_of_fixmatch():
    image = jnp.zeros((32, 32, 3), jnp.uint8)
    keys = jax.random.split(jax.random.key(0), 200)
    found = np.asarray(jax.jit(jax.vmap(policy._with_square, (0, None)))(keys, image))
    inside = (found == np.array(policy._GREY)).all(-1)
    assert ((found == 0).all(-1) | inside).all()
    sides = inside.any(1).sum(-1), inside.any(2).sum(-1)
    assert max(map(np.max, sides)) <= 17 and max(map(np.max, sides)) > 14
    for one in inside:
        assert np.array_equal(one, one.any(1)[:, None] & one.any(0))


def test_the_step_distorts_both_networks_images_alike(tmp_path):
    fields = {f"data__{name}": value for name, value in EVERYTHING.items()}
    spec, _, _ = steps.spec_of(tmp_path, 1, method="kd", **fields)
    assert spec.distortion.active and spec.distortion.erase == 0.5
    assert spec.distortion.mean == spec.student_pixels.mean
    plain, _, _ = steps.spec_of(tmp_path, 1, method="kd")
    assert not plain.distortion.active
