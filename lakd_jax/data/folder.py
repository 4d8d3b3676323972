"""Image folders: PATH/train/CLASS/x.png and PATH/test/CLASS/x.png."""

import pathlib

import numpy as np

from lakd_jax import errors, paths
from lakd_jax.data import dataset, images

SUFFIXES = (".png", ".jpg", ".jpeg")


def load(
    path: str, image_size: int, max_bad: int = 0
) -> tuple[tuple[str, ...], dataset.Split, dataset.Split]:
    """Reads a folder of images into (classes, train, test).

    Classes are sorted by name, images by class and file name; an image's id is its
    position in that order.

    Args:
      path: a folder with the subfolders `train` and `test`.
      image_size: height and width in pixels; 0 keeps the images' size, which must
        then be equal for all.
      max_bad: how many undecodable training images may be skipped.

    Raises:
      ConfigError: `path` is not a local path.
      DataError: a folder is missing or empty, there are fewer than two classes, the
        splits have different classes, image sizes differ, or an image cannot be
        decoded.
    """
    root = paths.local(path, "data.source")
    classes, (train_files, test_files) = list_files(path)
    train = _read(root / "train", train_files, image_size, max_bad)
    # No test image may be skipped: results are for the complete test split.
    test = _read(root / "test", test_files, image_size, 0)
    files = {"train": train_files, "test": test_files}
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = [f"{s.images.shape[2]}x{s.images.shape[1]}" for s in (train, test)]
        first = [next(iter(files[role].values()))[0] for role in ("train", "test")]
        raise errors.DataError(
            f"images differ in size: {first[0]} is {sizes[0]}, {first[1]} is "
            f"{sizes[1]} (width x height). Set data.image_size to resize all of them."
        )
    return classes, train, test


def list_files(
    path: str,
) -> tuple[tuple[str, ...], list[dict[str, list[pathlib.Path]]]]:
    """Returns (classes, [{class: files} of train, of test]) in the order of `load`.

    Raises:
      DataError: as for `load`, except for images, which are not opened.
    """
    root = paths.local(path, "data.source")
    train, test = (_list_split(root, role) for role in ("train", "test"))
    _check_classes(root, set(train), set(test))
    return tuple(train), [train, test]


def _list_split(root: pathlib.Path, role: str) -> dict[str, list[pathlib.Path]]:
    """Returns {class: sorted image files} of one split, sorted by class."""
    _require_folder(root, "data.source must be a folder")
    _require_folder(root / role, f"an image folder needs {role}/CLASS/ subfolders")
    folders = sorted(
        (p for p in (root / role).iterdir() if p.is_dir() and p.name[0] != "."),
        key=lambda p: p.name,
    )
    found = {folder.name: _image_files(folder) for folder in folders}
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        where = root / role / (empty[0] if empty else "")
        raise errors.DataError(
            f"{where}: no images. Expected files ending in {', '.join(SUFFIXES)}"
            + ("." if empty else f" in {role}/CLASS/ subfolders.")
        )
    return found


def _require_folder(path: pathlib.Path, meaning: str) -> None:
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise errors.DataError(f"{path} {state}: {meaning}.")


def image_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns all images below a folder, sorted; hidden files and folders are not."""
    _require_folder(root, "a folder of images is needed")
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    files = (
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )
    return sorted(files, key=lambda p: p.name)


def _check_classes(root: pathlib.Path, train: set[str], test: set[str]) -> None:
    if train != test:
        only = {"train": sorted(train - test), "test": sorted(test - train)}
        lines = [
            f"  only in {role}/: {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for role, names in only.items()
            if names
        ]
        raise errors.DataError(
            f"{root}: train/ and test/ must have the same classes.\n" + "\n".join(lines)
        )
    if len(train) < 2:
        raise errors.DataError(
            f"{root}: only one class, {next(iter(train))!r}; at least two are needed."
        )


def _read(
    folder: pathlib.Path,
    files: dict[str, list[pathlib.Path]],
    image_size: int,
    max_bad: int,
) -> dataset.Split:
    names = [str(path) for class_files in files.values() for path in class_files]
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    pixels, good = images.decode_all(
        names, names.__getitem__, image_size, str(folder), max_bad
    )
    return dataset.new_split(pixels, labels[good], good)
