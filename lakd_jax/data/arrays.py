"""Data sets stored as arrays in one NumPy file."""

import pathlib
import zipfile

import numpy as np
from PIL import Image

from lakd_jax import errors, paths
from lakd_jax.data import dataset, notes
from lakd_jax.data import images as images_lib

_TRAIN = ("train_images", "train_labels")
_TEST = ("test_images", "test_labels")

Arrays = dict[str, np.ndarray]


def load(path: str, image_size: int, test_share: float = 0.0) -> dataset.Dataset:
    """Reads a data set from `np.savez(path, train_images=..., ...)`.

    Args:
      path: a file with `train_images`, `test_images` (N, H, W, 3) uint8 RGB, and
        `train_labels`, `test_labels` (N,) or (N, 1) integers from 0; optionally
        `classes`, one name per label.
      image_size: height and width in pixels; 0 keeps the images' size.
      test_share: share of the images that is tested on, of a file without test arrays.

    Raises:
      ConfigError: `path` is not a local path.
      DataError: the file does not exist, or an array, which the message names, is
        missing or invalid; the message says how to make it valid.
    """
    file = paths.local(path, "data.source")
    found = _read(file)
    _check_names(file, found, test_share)
    train = _split(file, found, "train", image_size)
    if _TEST[0] in found:
        test = _split(file, found, "test", image_size)
    else:
        mask = dataset.mask_of_share(train.labels, test_share, "data.test_share")
        train, test = train.take(~mask), train.take(mask)
    if train.shape != test.shape:
        raise errors.DataError(
            f"{file}: train_images are {train.shape}, test_images "
            f"{test.shape}. Set data.image_size to resize all of them."
        )
    classes = _classes(file, found, train, test)
    notes.report_missing(str(file), "test", classes, set(test.labels.tolist()))
    return dataset.Dataset(path, classes, train, None, test)


def _check_names(file: pathlib.Path, found: Arrays, test_share: float) -> None:
    has_test = any(name in found for name in _TEST)
    if has_test and test_share:
        raise errors.DataError(
            f"{file}: data.test_share={test_share:g} is for a file without test "
            "arrays: set it to 0, or leave them out."
        )
    required = (*_TRAIN, *(() if test_share else _TEST))
    if missing := [name for name in required if name not in found]:
        there = f" It has {notes.listed(sorted(found), 8)}." if found else ""
        share = " Without a test split set data.test_share, e.g. to 0.2."
        raise errors.DataError(
            f"{file}: {', '.join(missing)} missing. Write it with np.savez(path, "
            f"{', '.join(f'{name}=...' for name in required)}).{there}"
            + ("" if has_test or test_share else share)
        )
    if left := sorted(found.keys() - {*_TRAIN, *_TEST, "classes"}):
        notes.note(f"{file}: left out arrays {notes.listed(left)}")


def _classes(
    file: pathlib.Path, found: Arrays, train: dataset.Split, test: dataset.Split
) -> tuple[str, ...]:
    count = 1 + int(max(train.labels.max(), test.labels.max()))
    given = found.get("classes", np.arange(count)).ravel().tolist()
    names = [n.decode() if isinstance(n, bytes) else str(n) for n in given]
    if absent := set(range(len(names))) - set(train.labels.tolist()):
        from_1 = " Subtract 1 from all labels." if min(absent) == 0 else ""
        raise errors.DataError(
            f"{file}: no image in train_labels has the label {min(absent)}, of "
            f"{len(names)} classes; number classes from 0 without gaps.{from_1}"
        )
    if len(names) != count or count < 2:
        raise errors.DataError(
            f"{file}: labels go up to {count - 1}, but there are {len(names)} classes; "
            "give as many names as labels, two or more."
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise errors.DataError(
            f"{file}: classes has {repeated[0]!r} more than once; give each label a "
            "name of its own."
        )
    return tuple(names)


def _read(file: pathlib.Path) -> Arrays:
    name = ""
    try:
        with np.load(file) as found:
            arrays = {}
            for name in found.files:
                arrays[name] = found[name]
            return arrays
    # np.load gives a single array (.npy) without a context manager (TypeError), and
    # raises ValueError for pickled objects.
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise errors.DataError(
            f"{file}: not readable as arrays written by np.savez ({error})."
            + (
                f" If {name} holds objects: np.array(..., dtype=str) for names, "
                "np.stack(...) for images."
                if name and isinstance(error, ValueError)
                else ""
            )
        ) from error


def _split(
    file: pathlib.Path, found: Arrays, role: str, image_size: int
) -> dataset.Split:
    images, labels = found[f"{role}_images"], found[f"{role}_labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise errors.DataError(
            f"{file}: {role}_images must be uint8 of (N, H, W, 3), is {images.dtype} "
            f"of {images.shape}.{_image_hint(images)}"
        )
    if labels.shape == (len(images), 1):  # as Keras has them
        labels = labels[:, 0]
    is_integer = np.issubdtype(labels.dtype, np.integer)
    if not is_integer or labels.shape != images.shape[:1] or not labels.size:
        raise errors.DataError(
            f"{file}: {role}_labels must be one integer for each of {len(images)} "
            f"images (at least one), is {labels.dtype} of {labels.shape}."
            f"{_label_hint(labels, len(images))}"
        )
    if labels.min() < 0:
        secret = (
            " If these labels are unknown, leave out both test arrays and set "
            "data.test_share."
        )
        raise errors.DataError(
            f"{file}: {role}_labels has {labels.min()}; number classes from 0."
            + (secret if role == "test" else "")
        )
    if image_size:
        pictures = map(Image.fromarray, images)
        resized = [np.asarray(images_lib.resize(p, image_size)) for p in pictures]
        images = np.stack(resized)
    return dataset.new_split(images, labels)


def _image_hint(images: np.ndarray) -> str:
    """Returns what turns such images into (N, H, W, 3) uint8; "" if that is unclear."""
    steps, shape = [], images.shape
    if len(shape) == 4 and shape[1] == 3 != shape[3]:
        steps.append("channels come first: .transpose(0, 2, 3, 1)")
    elif len(shape) == 3:
        steps.append("grey: np.repeat(images[..., None], 3, axis=-1)")
    elif len(shape) == 4 and shape[3] == 1:
        steps.append("grey: np.repeat(images, 3, axis=-1)")
    elif len(shape) == 4 and shape[3] == 4:
        steps.append("RGBA: images[..., :3] leaves out the transparency")
    elif len(shape) == 2:
        steps.append("flat rows: images.reshape(-1, H, W, 3)")
    if images.dtype != np.uint8 and images.size and images.dtype.kind in "fiu":
        low, high = images.min(), images.max()
        if low < 0 or high > 255:
            steps.append(f"values from {low:g} to {high:g}: scale them to 0..255")
        elif high <= 1 and images.dtype.kind == "f":
            steps.append("values in 0..1: (images * 255).round().astype(np.uint8)")
        else:
            steps.append("values in 0..255: images.round().astype(np.uint8)")
    return f" To do: {'; '.join(steps)}." if steps else ""


def _label_hint(labels: np.ndarray, count: int) -> str:
    """Returns what turns such labels into (N,) integers; "" if that is unclear."""
    if labels.ndim == 2 and len(labels) == count:
        return " If one-hot: labels.argmax(axis=1)."
    if labels.shape != (count,):
        return ""
    if labels.dtype.kind in "US":
        return " Names: classes, labels = np.unique(labels, return_inverse=True)."
    return " Whole numbers: labels.astype(int)."
