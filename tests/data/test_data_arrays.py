"""Data sets stored as arrays in one file, and errors for invalid ones."""

import numpy as np
import pytest

from lakd_jax import data, errors


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {}
    for role, count in (("train", 12), ("test", 6)):
        made[f"{role}_images"] = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        made[f"{role}_labels"] = np.arange(count) % 3
    return {n: v for n, v in (made | changes).items() if v is not None}


def loaded(path, made, **options):
    np.savez(path / "mine.npz", **made)
    return data.load(f"npz:{path / 'mine.npz'}", **options)


def test_arrays_are_loaded_unchanged(tmp_path):
    made = arrays(classes=["ant", "bee", "cat"])
    found = loaded(tmp_path, made)
    assert found.classes == ("ant", "bee", "cat")
    for role, split in (("train", found.train), ("test", found.test)):
        np.testing.assert_array_equal(split.images, made[f"{role}_images"])
        np.testing.assert_array_equal(split.labels, made[f"{role}_labels"])
    assert found.fingerprint() == loaded(tmp_path, made).fingerprint()


def test_classes_without_names_are_numbers_and_sizes_can_be_changed(tmp_path):
    wide = np.full((6, 10, 20, 3), 7, np.uint8)
    found = loaded(tmp_path, arrays(test_images=wide), image_size=4)
    assert found.classes == ("0", "1", "2")
    assert found.train.images.shape == (12, 4, 4, 3)
    assert np.all(found.test.images == 7) and found.test.images.shape == (6, 4, 4, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_labels": None}, "test_labels missing"),
        ({"train_images": np.zeros((12, 8, 8), np.uint8)}, "np.repeat"),
        ({"train_images": np.zeros((12, 8, 8, 3))}, "must be uint8"),
        ({"train_labels": np.zeros(11, int)}, "for each of 12 images"),
        ({"train_labels": np.zeros(12)}, "is float64"),
        ({"test_labels": np.full(6, -1)}, "has -1"),
        ({"test_labels": np.full(6, 3)}, "no image in train_labels has the label 3"),
        ({"classes": ["a", "b"]}, "labels go up to 2, but there are 2 classes"),
        ({"classes": list("abcd")}, "has the label 3, of 4"),
        ({"test_images": np.zeros((6, 9, 9, 3), np.uint8)}, "Set data.image_size"),
    ],
)
def test_invalid_arrays_are_named(changes, words, tmp_path):
    with pytest.raises(errors.DataError, match=f"mine.npz: .*{words}"):
        loaded(tmp_path, arrays(**changes))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", "npy", "pickle"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "mine.npz"
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif content == "pickle":
        np.savez(path, train_images=np.array([{}], object))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.DataError, match="mine.npz: not readable"):
        data.load(f"npz:{path}")
