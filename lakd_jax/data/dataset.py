"""Data sets in memory: splits of uint8 images, labels and stable ids."""

import dataclasses
import hashlib

import numpy as np

from lakd_jax import errors


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split, in memory.

    Attributes:
      images: (N, H, W, 3) uint8, RGB.
      labels: (N,) int32, indices into `Dataset.classes`.
      ids: (N,) int32, each example's index in the split of its source, which it keeps
        when a part of the split is held out.
      names: (N,) names of the examples, such as those of their files; None without.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    names: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (H, W, 3) of an image."""
        return self.images.shape[1:]

    def name(self, index: int) -> str:
        """Returns the name of an example in messages and tables."""
        if self.names is not None:
            return str(self.names[index])
        return f"example {self.ids[index]}"

    def take(self, chosen: np.ndarray) -> "Split":
        """Returns the examples that `chosen`, a mask or indices, selects."""
        names = None if self.names is None else self.names[chosen]
        arrays = self.images[chosen], self.labels[chosen], self.ids[chosen]
        return Split(*arrays, names)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set of labelled images; `minival` is held out from the training split."""

    name: str
    classes: tuple[str, ...]
    train: Split
    minival: Split | None
    test: Split

    @property
    def preview(self) -> "Dataset":
        """The data set that pictures and reports use: all of it."""
        return self

    def fingerprint(self) -> str:
        """Returns 16 hex digits: a hash of pixels, labels, ids, splits and class names.

        The name of the data set is not included: the same images from another path have
        the same fingerprint.
        """
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=8)
        for role in ("train", "minival", "test"):
            split = getattr(self, role)
            if split is None:
                continue
            digest.update(f"{role}{split.images.shape}".encode())
            for array in (split.images, split.labels, split.ids):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def new_split(
    images: np.ndarray, labels: np.ndarray, ids: np.ndarray | None = None
) -> Split:
    """Returns a split of (N, H, W, 3) images; `ids` default to 0, ..., N - 1."""
    ids = np.arange(len(images)) if ids is None else ids
    images = np.ascontiguousarray(images)
    return Split(images, labels.astype(np.int32), ids.astype(np.int32))


def stratified_mask(labels: np.ndarray, count: int) -> np.ndarray:
    """Selects `count` of the examples, with the share of every class preserved.

    The selection depends on `labels` (N,) alone. Shares are rounded by the largest
    remainder method, so exactly `count` entries of the (N,) bool mask are set.
    """
    classes, member, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = sizes * count / len(labels)
    quota = np.floor(share).astype(np.int64)
    extra = np.argsort(quota - share, kind="stable")[: count - quota.sum()]
    quota[extra] += 1
    # Sorts raw Philox words: NumPy guarantees that stream across versions, but not
    # the methods of Generator.
    order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind="stable")
    mask = np.zeros(len(labels), bool)
    for index in range(len(classes)):
        of_class = order[member[order] == index]
        mask[of_class[: quota[index]]] = True
    return mask


def few(found: Dataset, per_class: int, seed: int) -> Dataset:
    """Keeps `per_class` training examples of every class, chosen at random by seed.

    Raises:
      DataError: a class has fewer.
    """
    # Sorts raw words, as `stratified_mask` does: stable across versions.
    train = found.train
    words = np.random.Philox(key=[seed, 1]).random_raw(len(train))
    order, chosen = np.argsort(words, kind="stable"), []
    for label, name in enumerate(found.classes):
        of_class = order[train.labels[order] == label]
        if len(of_class) < per_class:
            raise errors.DataError(
                f"data.per_class={per_class}, but class {name} has {len(of_class)} "
                "training images: lower it, or set it to 0."
            )
        chosen.append(of_class[:per_class])
    kept = train.take(np.sort(np.concatenate(chosen)))
    return dataclasses.replace(found, train=kept)


def mask_of_share(labels: np.ndarray, share: float, field: str) -> np.ndarray:
    """Selects a share of the examples by `stratified_mask`.

    Args:
      labels: (N,).
      share: of the examples, 0 to 1.
      field: of the config that has the share, for the message.

    Raises:
      DataError: nothing would be selected, or a class would lose all its images.
    """
    count = round(share * len(labels))
    mask = stratified_mask(labels, count)
    if not count or len(np.unique(labels[~mask])) < len(np.unique(labels)):
        raise errors.DataError(
            f"{field}={share:g} takes {count} of {len(labels)} training images: "
            "give a fraction that holds out at least one image and leaves one of "
            "every class."
        )
    return mask


def hold_out(train: Split, fraction: float) -> tuple[Split, Split]:
    """Splits `train` into (remaining, held-out) examples, stratified by class.

    Raises:
      DataError: nothing would be held out, or a class would lose all its images.
    """
    mask = mask_of_share(train.labels, fraction, "data.minival")
    return train.take(~mask), train.take(mask)


def count_repeated(train: Split, other: Split) -> int:
    """Counts the images of `other` that are in `train`, equal in every pixel."""
    if train.shape != other.shape:
        return 0
    known = {_digest(image) for image in train.images}
    return sum(_digest(image) in known for image in other.images)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
