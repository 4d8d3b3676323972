"""Finds the splits and classes of an image folder, without opening an image.

The usual layout is ROOT/train/CLASS/x.png and ROOT/test/CLASS/x.png. What data sets
have instead of it when they are unpacked is understood as well, see `find`.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lakd_jax import errors, paths
from lakd_jax.data import dataset, notes

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".webp", ".bmp", ".gif", ".tif", ".tiff"),
)
# Names of the splits' folders in any case; earlier ones are preferred.
_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_RUBBISH = ("__MACOSX", "@eaDir")  # left by macOS's zip and Synology; like hidden files

_HIDDEN = "hidden files or folders"

ByClass = dict[str, list[pathlib.Path]]  # {class: its files}, both sorted
LeftOut = collections.Counter[str]  # {what was left out and why: how many}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The image files of each split by class, in the order of `classes`.

    Attributes:
      classes: sorted by name.
      train: every class has images.
      test: may lack classes.
      minival: of a `val` folder next to `test`; None without one.
    """

    classes: tuple[str, ...]
    train: ByClass
    test: ByClass
    minival: ByClass | None = None

    def files(self, split: ByClass) -> tuple[list[pathlib.Path], np.ndarray]:
        """Returns all files of a split, by class and name, and their labels (N,)."""
        counts = [len(split.get(name, ())) for name in self.classes]
        files = [path for name in self.classes for path in split.get(name, ())]
        return files, np.repeat(np.arange(len(counts)), counts)


def find(path: str, test_share: float = 0.0) -> Layout:
    """Finds the splits of an image folder.

    Split folders may be called `Train`, `training`, `Test`, `valid` and the like. A
    `val` folder is the test split if there is no labelled `test`, else the minival.
    Classes may have folders of their own; files of Tiny-ImageNet's `val` are sorted by
    its `val_annotations.txt`. Everything that is left out is counted in one line.

    Args:
      path: the folder.
      test_share: share of the images that is tested on, of a folder without a test
        split: one that has only `train`, or only classes.

    Raises:
      ConfigError: `path` is not a local path.
      DataError: a folder is missing or empty, there are fewer than two classes, or a
        class has no training images; the message says what is there instead.
    """
    root, left = paths.local(path, "data.source"), collections.Counter()
    _require_folder(root, "data.source must be a folder")
    splits = _split_folders(root, left)
    if "train" in splits:
        layout = _from_splits(root, splits, test_share, left)
    else:
        layout = _from_classes(root, splits, test_share, left)
    if len(layout.classes) < 2:
        raise errors.DataError(
            f"{root}: only one class, {layout.classes[0]!r}; at least two are needed."
            + _hint(root)
        )
    _report(root, layout, left)
    return layout


def image_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns all images below a folder; a line counts the other files.

    Raises:
      DataError: it is not a folder.
    """
    _require_folder(root, "a folder of images is needed")
    left: LeftOut = collections.Counter()
    found = _image_files(root, left)
    _report_left_out(root, left)
    return found


def _split_folders(root: pathlib.Path, left: LeftOut) -> dict[str, pathlib.Path]:
    """Returns the folders of the splits by "train", "val" and "test"."""
    found: dict[str, pathlib.Path] = {}
    candidates = {path.name: path for path in _folders(root)}
    for role, names in _NAMES.items():
        ranked = sorted(
            (n for n in candidates if n.lower() in names),
            key=lambda n: (names.index(n.lower()), n != n.lower(), n),
        )
        for name in ranked[:1]:
            found[role] = candidates.pop(name)
    if "train" in found:  # else these are classes
        left.update({f"folder {name}/": 1 for name in candidates})
    return found


def _from_splits(
    root: pathlib.Path,
    splits: dict[str, pathlib.Path],
    test_share: float,
    left: LeftOut,
) -> Layout:
    train = _classes(splits["train"], left)
    empty = [name for name, files in train.items() if not files]
    if empty or not train:
        where = splits["train"] / empty[0] if empty else splits["train"]
        raise _no_images(where, left)
    found = {}
    for role in ("val", "test"):
        if role in splits and (files := _labelled(splits[role], train, left)):
            found[role] = files
    for role, files in found.items():
        _check_classes(splits[role], train, files)
    if not found:
        unlabelled = splits.get("test") or splits.get("val")
        if not test_share:
            raise _no_test(root, unlabelled)
        return _shared(train, test_share)
    test = found.get("test") or found["val"]
    if test_share:
        place = splits["test" if "test" in found else "val"]
        raise errors.DataError(
            f"data.test_share={test_share:g} is for a folder without a test split, "
            f"which {place} is: set it to 0."
        )
    minival = found.get("val") if "test" in found else None
    return Layout(tuple(train), train, test, minival)


def _from_classes(
    root: pathlib.Path,
    splits: dict[str, pathlib.Path],
    test_share: float,
    left: LeftOut,
) -> Layout:
    """Returns the layout of a folder of classes, which has no `train`."""
    if splits or not test_share:
        raise _no_train(root, splits)
    classes = {n: files for n, files in _classes(root, left).items() if files}
    if not classes:
        raise _no_images(root, left)
    return _shared(classes, test_share)


def _shared(files: ByClass, test_share: float) -> Layout:
    """Splits the files of all classes into training and test files."""
    everything = Layout(tuple(files), files, {})
    labels = everything.files(files)[1]
    chosen = dataset.mask_of_share(labels, test_share, "data.test_share")
    parts: dict[bool, ByClass] = {False: {}, True: {}}
    start = 0
    for name, of_class in files.items():
        for path, in_test in zip(of_class, chosen[start:], strict=False):
            parts[bool(in_test)].setdefault(name, []).append(path)
        start += len(of_class)
    return Layout(tuple(files), parts[False], parts[True])


# -------------------------------------------------------------------------- one split


def _classes(folder: pathlib.Path, left: LeftOut) -> ByClass:
    """Returns {class: image files} of a folder of classes; a list may be empty."""
    for name in sorted(p.name for p in folder.iterdir() if not p.is_dir()):
        if _is_image(name, left):
            left["images in no class folder"] += 1
    left[_HIDDEN] += sum(p.is_dir() and _is_hidden(p.name) for p in folder.iterdir())
    return {sub.name: _image_files(sub, left) for sub in _folders(folder)}


def _labelled(folder: pathlib.Path, train: ByClass, left: LeftOut) -> ByClass:
    """Returns {class: image files} of `val` or `test`; {} if its labels are unknown."""
    annotations = folder / f"{folder.name.lower()}_annotations.txt"
    if annotations.is_file():
        return _annotated(folder, annotations, left)
    inside: LeftOut = collections.Counter()
    classes = _classes(folder, inside)
    images = inside.pop("images in no class folder", 0)
    if set(classes) == {"images"} and "images" not in train:
        images += len(classes.pop("images"))
    found = {name: files for name, files in classes.items() if files}
    if images:
        left[f"images of {folder.name}/ without a class"] += images
    elif not found:
        raise _no_images(folder, inside)
    left.update(inside)
    return found


def _annotated(folder: pathlib.Path, table: pathlib.Path, left: LeftOut) -> ByClass:
    """Returns {class: image files} by a table of lines "FILE<tab>CLASS<tab>..."."""
    lines = [line.split("\t") for line in table.read_text("utf-8").splitlines() if line]
    if wrong := [number for number, parts in enumerate(lines, 1) if len(parts) < 2]:
        raise errors.DataError(
            f"{table}, line {wrong[0]}: not a file and a class separated by a tab."
        )
    class_of = {parts[0].strip(): parts[1].strip() for parts in lines}
    found: ByClass = {}
    for path in _image_files(folder, left):
        if path.name in class_of:
            found.setdefault(class_of.pop(path.name), []).append(path)
        else:
            left[f"images not in {table.name}"] += 1
    left[".txt"] -= 1  # it was read
    if class_of:
        raise errors.DataError(
            f"{folder}: {len(class_of)} images of {table.name} are missing, such as "
            f"{next(iter(class_of))}."
        )
    return {name: found[name] for name in sorted(found)}


def _image_files(folder: pathlib.Path, left: LeftOut) -> list[pathlib.Path]:
    """Returns the image files in a folder and its subfolders, sorted by path."""
    found, seen = [], set()
    # Links are followed, as subsets are made of them; a link upwards is not.
    for place, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        left[_HIDDEN] += sum(map(_is_hidden, folders))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [pathlib.Path(place, name) for name in files if _is_image(name, left)]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _unreadable(error: OSError) -> None:
    raise errors.DataError(f"{error.filename}: cannot be listed ({error.strerror}).")


def _is_image(name: str, left: LeftOut) -> bool:
    """Returns whether a file is an image by its name; counts it in `left` if not."""
    suffix = pathlib.PurePath(name).suffix.lower()
    if name.startswith("."):
        left[_HIDDEN] += suffix in SUFFIXES
        return False
    if suffix not in SUFFIXES:
        left[suffix or "without a suffix"] += 1
        return False
    return True


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _RUBBISH


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the subfolders that are not hidden, sorted by name."""
    found = (p for p in folder.iterdir() if p.is_dir() and not _is_hidden(p.name))
    return sorted(found, key=lambda p: p.name)


# --------------------------------------------------------------------- what is reported


def _report(root: pathlib.Path, layout: Layout, left: LeftOut) -> None:
    """Prints what was left out, which classes lack test images, and an odd order."""
    _report_left_out(root, left)
    for role in ("test", "minival"):
        if (split := getattr(layout, role)) is not None:
            labels = set(layout.files(split)[1].tolist())
            notes.report_missing(str(root), role, layout.classes, labels)
    if all(name.isdecimal() for name in layout.classes):
        if list(layout.classes) != sorted(layout.classes, key=int):
            notes.note(
                f"{root}: classes are sorted as text, not as numbers: labels 0, 1, 2, "
                f"... are {notes.listed(list(layout.classes))}"
            )


def _report_left_out(root: pathlib.Path, left: LeftOut) -> None:
    if counts := _counted(left):
        kinds = ", ".join(SUFFIXES)
        notes.note(f"{root}: left out {notes.listed(counts, 8)} (images are {kinds})")


def _counted(left: LeftOut) -> list[str]:
    found = sorted(what for what, count in left.items() if count)
    return [w if w.startswith("folder ") else f"{left[w]} {w}" for w in found]


def _check_classes(place: pathlib.Path, train: ByClass, other: ByClass) -> None:
    """Raises DataError for classes that have no training images."""
    if not (extra := [name for name in other if name not in train]):
        return
    missing = [name for name in train if name not in other]
    lines = [f"  only in {place.name}/: {notes.listed(extra)}"]
    if missing:
        lines.insert(0, f"  only in train/: {notes.listed(missing)}")
    raise errors.DataError(
        f"{place} has classes without training images.\n" + "\n".join(lines)
    )


def _require_folder(path: pathlib.Path, meaning: str) -> None:
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise errors.DataError(f"{path} {state}: {meaning}.")


def _no_images(place: pathlib.Path, left: LeftOut) -> errors.DataError:
    counts = _counted(left)
    there = f" There are {notes.listed(counts)}." if counts else ""
    return errors.DataError(
        f"{place}: no images in class folders. Expected files ending in "
        f"{', '.join(SUFFIXES)}.{there}"
    )


def _no_test(root: pathlib.Path, unlabelled: pathlib.Path | None) -> errors.DataError:
    fault = f"{root / 'test'} does not exist, nor val/"
    if unlabelled:
        fault = f"{unlabelled} has images but no class folders to test on"
    return errors.DataError(
        f"{fault}: add test/CLASS/ or val/CLASS/ folders, or set data.test_share, e.g. "
        "to 0.2, to test on a share of train/."
    )


def _no_train(root: pathlib.Path, splits: dict[str, pathlib.Path]) -> errors.DataError:
    """Says what a folder without `train` holds, and which value of a field fits it."""
    text = f"{root / 'train'} does not exist: an image folder needs train/CLASS/."
    if not splits and len(classes := _class_names(root)) > 1:
        text = (
            f"{root} has class folders ({notes.listed(classes)}) but no train/ and "
            "test/: set data.test_share, e.g. to 0.2, to test on a share of them."
        )
    if names := [path.name + "/" for path in _folders(root)]:
        text += f" It has {notes.listed(names)}."
    return errors.DataError(text + _hint(root))


def _hint(root: pathlib.Path) -> str:
    """Returns a sentence about a folder close to `root` that would do; "" for none."""
    if root.name.lower() in sum(_NAMES.values(), ()) and "train" in _split_folders(
        root.absolute().parent, collections.Counter()
    ):
        return f"\nUse its parent: data.source=folder:{root.absolute().parent}"
    for sub in _near(root):
        if "train" in _split_folders(sub, collections.Counter()):
            return f"\nThis subfolder would do: data.source=folder:{sub}"
        if len(_class_names(sub)) > 1:
            return (
                f"\nThis subfolder has classes: data.source=folder:{sub} with "
                "data.test_share=0.2"
            )
    return ""


def _near(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the subfolders of a folder, then theirs; a few of each."""
    first: Sequence[pathlib.Path] = _folders(root)[:20]
    yield from first
    for folder in first:
        yield from _folders(folder)[:20]


def _class_names(folder: pathlib.Path) -> list[str]:
    """Returns the names of the subfolders that have images directly in them."""
    ignored: LeftOut = collections.Counter()
    return [
        sub.name
        for sub in _folders(folder)
        if any(_is_image(entry.name, ignored) for entry in os.scandir(sub))
    ]
