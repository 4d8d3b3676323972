"""Tests mixup and CutMix against timm's numbers, and their shares."""

import json

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lakd_jax.config import check
from lakd_jax.data import mixing

FILE = golden_weights.FOLDER / "recipes/mixup.json"
CASES = json.loads(FILE.read_text())["cases"]
# Ours corrects the share by the box that is left, and has one share per batch.
OURS = [n for n, c in CASES.items() if c["mode"] == "batch" and c["correct_lam"]]


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE.with_suffix(".npz")) as file:
        return dict(file)


@pytest.mark.parametrize("name", OURS)
def test_images_and_labels_are_timms(name, golden):
    case, kept = CASES[name], CASES[name]["lam"]
    if case["cutmix"]:
        (centre,) = case["centre_y_x"]
        kept = mixing.outside_box(8, 10, kept, centre)
        top, bottom, left, right, share = case["box_y_y_x_x_lam"][0]
        expected = np.ones((8, 10))
        expected[top:bottom, left:right] = 0
        np.testing.assert_array_equal(kept, expected)
        assert float(jnp.mean(kept)) == pytest.approx(share, rel=1e-6)
    images = mixing.mixed(golden["images"].transpose(0, 2, 3, 1), kept)
    images = np.asarray(images).transpose(0, 3, 1, 2)
    assert golden_weights.distance(images, golden[f"{name}/images"]) < 1e-6
    how = mixing.Mixing(1.0, 1.0, 5, case["smoothing"])
    labels = how.soft_labels(golden["labels"], jnp.mean(kept))
    assert golden_weights.distance(labels, golden[f"{name}/targets"]) < 1e-6


@pytest.mark.parametrize(
    ("mixup", "cutmix", "boxes"), [(0.8, 0.0, 0.0), (0.0, 1.0, 1.0), (0.8, 1.0, 0.5)]
)
def test_shares_follow_the_distribution(mixup, cutmix, boxes):
    how = mixing.Mixing(mixup, cutmix, 3)
    keys = jax.random.split(jax.random.key(0), 400)
    shares = np.asarray(jax.jit(jax.vmap(lambda k: how.share(k, 16, 16)))(keys))
    constant = np.ptp(shares, (1, 2)) == 0
    is_box = np.isin(shares, (0.0, 1.0)).all((1, 2))
    assert (constant | is_box).all()
    assert np.mean(is_box) == pytest.approx(boxes, abs=0.08)
    kept = shares[~is_box][:, 0, 0]
    if mixup:  # Beta(a, a) has the variance 1 / (4 (2 a + 1))
        assert np.mean(kept) == pytest.approx(0.5, abs=0.06)
        assert np.var(kept) == pytest.approx(1 / (4 * (2 * mixup + 1)), abs=0.02)


def test_a_batch_is_mixed_with_itself_reversed():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    how, key = mixing.Mixing(1.0, 0.0, 3, 0.1), jax.random.key(1)
    program = jax.jit(
        lambda key: (how(key, images, jnp.arange(3)), how.share(key, 8, 8))
    )
    (ours, labels), share = program(key)
    kept = share[0, 0]
    assert 0.01 < kept < 0.99 and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[1], images[1], rtol=1e-5)  # its own partner
    expected = kept * images[0] + (1 - kept) * images[2]
    np.testing.assert_allclose(ours[0], expected, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(labels, -1), np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(labels[0, 2], (1 - kept) * 0.9 + 0.1 / 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"data__mixup": -1.0}, "data.mixup must be at least 0"),
        ({"method": "at+dkd"}, "but method dkd compares the networks by the one label"),
        ({"teacher__views": 2}, "the teacher's outputs cannot be stored"),
        ({"optim__class_weights": "1,2,3"}, "weighs images by their one label"),
        (
            {"method": "kd", "student__name": "hme", "hme__loss": "binary"},
            "which hme.loss=binary does not support",
        ),
    ],
)
def test_what_mixing_does_not_go_with(fields, line, tmp_path):
    mixed = {"method": "kd", "data__mixup": 0.2, **fields}
    (found,) = check.problems(tiny.config(tmp_path, **mixed), 1)
    assert line in found
    mixed["data__mixup"] = 0.0
    assert not check.problems(tiny.config(tmp_path, **mixed), 1)


def test_label_free_methods_take_mixed_images(tmp_path):
    mixed = {"method": "lakd", "data__cutmix": 1.0, "label_smoothing": 0.1}
    assert not check.problems(tiny.config(tmp_path, **mixed), 1)
