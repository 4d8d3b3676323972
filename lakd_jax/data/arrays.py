"""Data sets stored as arrays in one NumPy file."""

import pathlib
import zipfile

import numpy as np
from PIL import Image

from lakd_jax import errors, paths
from lakd_jax.data import dataset
from lakd_jax.data import images as images_lib

_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")


def load(
    path: str, image_size: int
) -> tuple[tuple[str, ...], dataset.Split, dataset.Split]:
    """Reads (classes, train, test) from `np.savez(path, train_images=..., ...)`.

    Args:
      path: a file with `train_images`, `test_images` (N, H, W, 3) uint8 RGB, and
        `train_labels`, `test_labels` (N,) integers from 0; optionally `classes`, one
        name per label.
      image_size: height and width in pixels; 0 keeps the images' size.

    Raises:
      ConfigError: `path` is not a local path.
      DataError: the file does not exist, or an array, which the message names, is
        missing or invalid.
    """
    file = paths.local(path, "data.source")
    found = _read(file)
    if missing := [name for name in _REQUIRED if name not in found]:
        raise errors.DataError(
            f"{file}: {', '.join(missing)} missing. Write it with np.savez(path, "
            f"{', '.join(f'{name}=...' for name in _REQUIRED)})."
        )
    train, test = (_split(file, found, role, image_size) for role in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise errors.DataError(
            f"{file}: train_images are {train.images.shape[1:]}, test_images "
            f"{test.images.shape[1:]}. Set data.image_size to resize all of them."
        )
    count = 1 + int(max(train.labels.max(), test.labels.max()))
    names = found.get("classes", np.arange(count))
    if absent := set(range(len(names))) - set(train.labels.tolist()):
        raise errors.DataError(
            f"{file}: no image in train_labels has the label {min(absent)}, of "
            f"{len(names)} classes; number classes from 0 without gaps."
        )
    if len(names) != count or count < 2:
        raise errors.DataError(
            f"{file}: labels go up to {count - 1}, but there are {len(names)} classes; "
            "give as many names as labels, two or more."
        )
    return tuple(map(str, names)), train, test


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as found:
            return dict(found)
    # np.load gives a single array (.npy) without a context manager (TypeError), and
    # raises ValueError for pickled objects.
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise errors.DataError(
            f"{file}: not readable as arrays written by np.savez ({error})."
        ) from error


def _split(
    file: pathlib.Path, found: dict[str, np.ndarray], role: str, image_size: int
) -> dataset.Split:
    images, labels = found[f"{role}_images"], found[f"{role}_labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise errors.DataError(
            f"{file}: {role}_images must be uint8 of (N, H, W, 3), is {images.dtype} "
            f"of {images.shape}. If grey: np.repeat(images[..., None], 3, axis=-1)."
        )
    is_integer = np.issubdtype(labels.dtype, np.integer)
    if not is_integer or labels.shape != images.shape[:1] or not labels.size:
        raise errors.DataError(
            f"{file}: {role}_labels must be one integer for each of {len(images)} "
            f"images (at least one), is {labels.dtype} of {labels.shape}."
        )
    if labels.min() < 0:
        raise errors.DataError(
            f"{file}: {role}_labels has {labels.min()}; number classes from 0."
        )
    if image_size:
        pictures = map(Image.fromarray, images)
        resized = [np.asarray(images_lib.resize(p, image_size)) for p in pictures]
        images = np.stack(resized)
    return dataset.new_split(images, labels)
