"""The digits, held-out splits and fingerprints."""

import dataclasses

import numpy as np
import pytest

from lakd_jax import data, errors
from lakd_jax.data import dataset


def test_digits_are_the_real_scans_and_always_split_alike():
    digits = data.load("digits")
    assert digits.train.images.shape == (1437, 16, 16, 3)
    assert digits.test.images.shape == (360, 16, 16, 3)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == digits.train.ids.dtype == np.int32
    assert digits.classes == tuple("0123456789")
    assert digits.minival is None
    # The fingerprint fixes pixels and split across machines and versions.
    assert digits.fingerprint() == "77a6e09a272fd9f9"
    share = np.bincount(digits.test.labels) / np.bincount(digits.train.labels)
    np.testing.assert_allclose(share, 360 / 1437, atol=0.005)


def test_digits_at_their_own_size_are_the_greys_scaled_to_255():
    from sklearn import datasets

    digits = data.load("digits", image_size=8)
    images = np.concatenate([digits.train.images, digits.test.images])
    expected = np.round(datasets.load_digits().images * 255 / 16).astype(np.uint8)
    assert (images == images[..., :1]).all()
    found = np.sort([image.tobytes() for image in images[..., 0]])
    assert (found == np.sort([image.tobytes() for image in expected])).all()


def test_enlarged_digits_keep_their_brightness():
    small, large = (data.load("digits", image_size=size) for size in (8, 32))
    assert large.train.images.shape[1:] == (32, 32, 3)
    means = [d.train.images.mean(axis=(1, 2, 3)) for d in (small, large)]
    np.testing.assert_allclose(*means, atol=2)


def test_stratified_mask_takes_exactly_the_count_and_every_share():
    labels = np.repeat(np.arange(4), [100, 50, 7, 3])
    for count in (1, 13, 16, 80, 159):
        mask = dataset.stratified_mask(labels, count)
        taken = np.bincount(labels[mask], minlength=4)
        assert mask.sum() == count
        exact = np.array([100, 50, 7, 3]) * count / 160
        assert (np.abs(taken - exact) < 1).all()
    chosen = np.flatnonzero(dataset.stratified_mask(labels, 16))
    assert (np.diff(chosen) > 1).any(), "the first of each class, not a random part"


def test_minival_is_taken_from_train_and_keeps_ids():
    full, parted = data.load("digits"), data.load("digits", minival=0.1)
    assert len(parted.minival) == 144 and len(parted.train) == 1437 - 144
    ids = np.concatenate([parted.train.ids, parted.minival.ids])
    np.testing.assert_array_equal(np.sort(ids), full.train.ids)
    for split in (parted.train, parted.minival):
        np.testing.assert_array_equal(split.images, full.train.images[split.ids])
        np.testing.assert_array_equal(split.labels, full.train.labels[split.ids])
    counts = np.bincount(parted.minival.labels)
    assert counts.min() >= 13 and counts.max() <= 16
    again = data.load("digits", minival=0.1)
    np.testing.assert_array_equal(again.minival.ids, parted.minival.ids)
    np.testing.assert_array_equal(parted.test.images, full.test.images)


def test_few_of_each_class_are_chosen_by_seed():
    digits = data.load("digits")
    train, few = digits.train, dataset.few(digits, 5, 0).train
    assert np.bincount(few.labels).tolist() == [5] * 10
    np.testing.assert_array_equal(few.images, train.images[few.ids])
    np.testing.assert_array_equal(few.ids, dataset.few(digits, 5, 0).train.ids)
    assert list(few.ids) != list(dataset.few(digits, 5, 1).train.ids)
    # Those of fewer are among those of more.
    assert set(few.ids) < set(dataset.few(digits, 6, 0).train.ids)
    more = dataclasses.replace(digits, classes=(*digits.classes, "none"))
    with pytest.raises(errors.DataError, match="class none has 0 training images"):
        dataset.few(more, 5, 0)


@pytest.mark.parametrize(
    ("source", "options", "field"),
    [
        ("", {}, "data.source"),
        ("folder:", {}, "data.source"),
        ("digits", {"image_size": -1}, "data.image_size"),
        *(
            ("digits", {"minival": fraction}, "data.minival")
            for fraction in (-0.1, 1.0, float("nan"), 1e-6, 0.9999)
        ),
    ],
)
def test_impossible_requests_are_refused(source, options, field):
    with pytest.raises(errors.DataError, match=field):
        data.load(source, **options)


def test_fingerprint_sees_pixels_labels_classes_and_splits():
    digits = data.load("digits")
    prints = {digits.fingerprint()}

    def changed(role: str, field: str) -> data.Dataset:
        array = getattr(getattr(digits, role), field).copy()
        array.flat[-1] += 1
        split = dataclasses.replace(getattr(digits, role), **{field: array})
        return dataclasses.replace(digits, **{role: split})

    for role in ("train", "test"):
        for field in ("images", "labels", "ids"):
            prints.add(changed(role, field).fingerprint())
    renamed = dataclasses.replace(digits, classes=("zero", *digits.classes[1:]))
    prints.add(renamed.fingerprint())
    prints.add(data.load("digits", minival=0.1).fingerprint())
    assert len(prints) == 9 and all(len(text) == 16 for text in prints)
    elsewhere = dataclasses.replace(digits, name="other")
    assert elsewhere.fingerprint() == digits.fingerprint()
