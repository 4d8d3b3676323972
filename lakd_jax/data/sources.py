"""Loads data sets by the name of their source."""

import dataclasses
import pathlib
import re
from collections.abc import Callable

import numpy as np

from lakd_jax import errors, paths
from lakd_jax.data import dataset, notes

_FOLDER = "folder:"
_ARRAYS = "npz:"
_BUILT_IN = ("digits", "folder", "npz")

Load = Callable[[str, int], dataset.Dataset]  # (what follows the name, image_size)
_ADDED: dict[str, Load] = {}


def register(name: str, load: Load) -> None:
    """Enters a source "NAME" or "NAME:REST"; an earlier one of that name goes.

    Raises:
      ValueError: the name is built in, or not a word in small letters.
    """
    if name in _BUILT_IN:
        raise ValueError(f"data {name!r} is built in: register another name")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"data {name!r}: the name must be a word in small letters")
    _ADDED[name] = load


def is_added(source: str) -> bool:
    """Whether the source is one that was registered."""
    return source.partition(":")[0] in _ADDED


def load(
    source: str,
    *,
    image_size: int = 0,
    minival: float = 0.0,
    data_dir: str = "",
    max_bad: int = 0,
    orientation: bool = True,
    test_share: float = 0.0,
) -> dataset.Dataset:
    """Loads a data set into memory.

    Args:
      source: "digits" (built in), "folder:PATH" (PATH/train/CLASS/x.png and
        PATH/test/CLASS/x.png, or see `layout.find`), "npz:PATH" (see `arrays.load`), a
        registered name, or a tfds name such as "cifar10".
      image_size: height and width in pixels, by resizing the shorter side and cropping
        the centre; 0 keeps the images' size (digits: 16).
      minival: fraction of the training split, 0 <= minival < 1, held out as
        `Dataset.minival`; stratified, the same in every run. Not used if the source
        has a minival of its own.
      data_dir: the data directory of tfds; "" is its default.
      max_bad: how many undecodable training images may be skipped.
      orientation: whether photos are turned as their EXIF tag says.
      test_share: share of the images that is tested on, 0 <= test_share < 1, if the
        source has no test split; stratified, the same in every run.

    Raises:
      DataError: the data is missing, invalid or damaged; the message says why.
    """
    if not 0 <= minival < 1:
        raise errors.DataError(f"data.minival={minival:g} must be at least 0, below 1.")
    if image_size < 0:
        raise errors.DataError(f"data.image_size={image_size} must not be negative.")
    if not 0 <= test_share < 1:
        raise errors.DataError(
            f"data.test_share={test_share:g} must be at least 0, below 1."
        )
    if is_added(source):
        found = _added(source, image_size)
    else:
        found = _read(source, image_size, data_dir, max_bad, orientation, test_share)
    if test_share and (source == "digits" or is_added(source)):
        raise errors.DataError(
            f"data.test_share={test_share:g} is for data without a test split; "
            f"{source} has one: set it to 0."
        )
    _report_repeated(source, found)
    train, held_out = found.train, found.minival
    if minival and held_out is None:
        train, held_out = dataset.hold_out(train, minival)
    return dataclasses.replace(found, name=source, train=train, minival=held_out)


def _report_repeated(source: str, found: dataset.Dataset) -> None:
    """Prints how many images of the test split are training images, too."""
    for role in ("test", "minival"):
        split = getattr(found, role)
        if split and (count := dataset.count_repeated(found.train, split)):
            notes.note(
                f"{source}: {count} of {len(split)} {role} images are training images, "
                "too, equal in every pixel: the accuracy on them says nothing about "
                "new images"
            )


def located(source: str, folder: pathlib.Path) -> str:
    """Returns the source with its path, if it has a relative one, below `folder`.

    What follows the name of a registered source is left to its function.
    """
    prefix, _, path = source.partition(":")
    if is_added(source) or f"{prefix}:" not in (_FOLDER, _ARRAYS):
        return source
    return f"{prefix}:{paths.within(folder, path, 'data.source')}"


def _added(source: str, image_size: int) -> dataset.Dataset:
    name, _, rest = source.partition(":")
    found = _ADDED[name](rest, image_size)
    if not isinstance(found, dataset.Dataset):
        kind = type(found).__name__
        raise errors.DataError(f"data.source={source}: gave {kind}, not data.Dataset.")
    for role in ("train", "minival", "test"):
        if (split := getattr(found, role)) is None:
            continue
        images = split.images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise errors.DataError(
                f"data.source={source}: images of {role} must be uint8 of (N, H, W, 3),"
                f" are {images.dtype} of {images.shape}."
            )
    return found


def _read(
    source: str,
    image_size: int,
    data_dir: str,
    max_bad: int,
    orient: bool,
    test_share: float,
) -> dataset.Dataset:
    # Imported on demand, since each source has dependencies that the others lack.
    if source == "digits":
        from lakd_jax.data import digits

        return digits.load(image_size)
    options = {"max_bad": max_bad, "orient": orient, "test_share": test_share}
    if source.startswith(_FOLDER) and source != _FOLDER:
        from lakd_jax.data import folder

        return folder.load(source.removeprefix(_FOLDER), image_size, **options)
    if source.startswith(_ARRAYS) and source != _ARRAYS:
        from lakd_jax.data import arrays

        return arrays.load(source.removeprefix(_ARRAYS), image_size, test_share)
    if source and source not in (_FOLDER, _ARRAYS):
        from lakd_jax.data.tfds import source as source_lib

        return source_lib.load(source, image_size, data_dir, **options)
    raise errors.DataError(
        f"data.source={source!r} names no data: use digits, folder:PATH, npz:PATH "
        "or a tfds name."
    )
