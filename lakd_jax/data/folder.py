"""Reads image folders into memory; `layout` says where their images are."""

import dataclasses
import pathlib

import numpy as np

from lakd_jax import errors
from lakd_jax.data import dataset, images
from lakd_jax.data import layout as layout_lib


def load(
    path: str,
    image_size: int,
    *,
    max_bad: int = 0,
    orient: bool = True,
    test_share: float = 0.0,
) -> dataset.Dataset:
    """Reads a folder of images, see `layout.find`.

    Classes are sorted by name, images by class and path; an image's id is its position
    in that order.

    Args:
      path: the folder.
      image_size: height and width in pixels; 0 keeps the images' size, which must
        then be equal for all.
      max_bad: how many undecodable training images may be skipped.
      orient: whether to turn photos as their EXIF tag says.
      test_share: as for `layout.find`.

    Raises:
      ConfigError: `path` is not a local path.
      DataError: as for `layout.find`; or image sizes differ, or an image cannot be
        decoded.
    """
    layout = layout_lib.find(path, test_share)

    def read(role: str, max_bad: int = 0) -> dataset.Split:
        files, labels = layout.files(getattr(layout, role))
        names = [str(file) for file in files]
        pixels, good = images.decode_all(
            names, names.__getitem__, image_size, f"{path} {role}", max_bad, orient
        )
        split = dataset.new_split(pixels, labels[good], good)
        return dataclasses.replace(split, names=np.array(names)[good])

    train = read("train", max_bad)
    # No test image may be skipped: results are for the complete test split.
    splits = {"train": train, "test": read("test")}
    if layout.minival:
        splits["minival"] = read("minival")
    for role, split in splits.items():
        if split.shape != train.shape:
            raise _sizes_differ(layout, role, splits)
    minival = splits.get("minival")
    return dataset.Dataset(path, layout.classes, train, minival, splits["test"])


def _sizes_differ(
    layout: layout_lib.Layout, role: str, splits: dict[str, dataset.Split]
) -> errors.DataError:
    def first(name: str) -> pathlib.Path:
        return layout.files(getattr(layout, name))[0][0]

    sizes = [f"{s.shape[1]}x{s.shape[0]}" for s in (splits["train"], splits[role])]
    return errors.DataError(
        f"images differ in size: {first('train')} is {sizes[0]}, {first(role)} is "
        f"{sizes[1]} (width x height). Set data.image_size to resize all of them."
    )
