"""Encoded images with random access from any process.

Objects of this module are pickled for the decoding processes, so they store paths and
offsets, and open files on use. TensorFlow is not needed.
"""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any, Protocol

import numpy as np

from lakd_jax import errors
from lakd_jax.data import layout as layout_lib
from lakd_jax.data.tfds import builders, source


class Records(Protocol):
    """The examples of a split, numbered from 0."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def read(self, index: int) -> tuple[str | bytes, int]:
        """Returns the path or the encoded bytes of an image, and its label."""
        ...

    def name(self, index: int) -> str:
        """Returns the example's name in error messages."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash of the names, sizes and number of the files."""
        ...


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files, each with a label; `classes` are the names of the labels."""

    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[str | bytes, int]:
        """See `Records`."""
        return self.paths[index], int(self.labels[index])

    def name(self, index: int) -> str:
        """See `Records`."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """See `Records`; uses the last two components of every path, and the class."""
        lines = []
        for path, label in zip(map(pathlib.Path, self.paths), self.labels, strict=True):
            line = f"{path.parent.name}/{path.name} {path.stat().st_size}"
            if self.classes and self.classes[label] != path.parent.name:
                line = f"{self.classes[label]}/{line}"
            lines.append(line)
        return digest("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A split of a data set prepared by tfds, as ArrayRecord or TFRecord.

    Attributes:
      directory: of the prepared version.
      split: its name.
      locations: for TFRecord, (N, 3) int64: file, offset and length of each record, see
        `source.tfrecord_locations`; None for ArrayRecord, which has an index.
    """

    directory: str
    split: str
    locations: np.ndarray | None

    def __len__(self) -> int:
        if self.locations is not None:
            return len(self.locations)
        return len(_array_records(self.directory, self.split))

    def read(self, index: int) -> tuple[str | bytes, int]:
        """See `Records`.

        Raises:
          DataError: the record cannot be read.
        """
        try:
            example = self._example(index)
        except Exception as error:  # missing, truncated or foreign files
            raise errors.DataError(
                f"{self.name(index)}: cannot be read from {self.directory} "
                f"({builders.brief(error)}). Prepare the data set again."
            ) from error
        return example["image"], int(example["label"])

    def _example(self, index: int) -> dict[str, Any]:
        if self.locations is None:
            return _array_records(self.directory, self.split)[index]
        number, offset, length = (int(n) for n in self.locations[index])
        path = _builder(self.directory).info.splits[self.split].filepaths[number]
        with path.open("rb") as file:
            file.seek(offset)
            record = file.read(length)
        if len(record) < length:
            raise EOFError(f"{path} ends within a record")
        features = _builder(self.directory).info.features
        return features.deserialize_example_np(record, decoders=source.encoded_images())

    def name(self, index: int) -> str:
        """See `Records`."""
        return (
            f"{pathlib.Path(self.directory).parent.name} {self.split}, example {index}"
        )

    def fingerprint(self) -> str:
        """See `Records`."""
        paths = _builder(self.directory).info.splits[self.split].filepaths
        return digest("\n".join(f"{p.name} {p.stat().length}" for p in paths))


def digest(text: str) -> str:
    """Returns a hash of the text as 16 hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=4)
def _builder(directory: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory)


@functools.lru_cache(maxsize=4)
def _array_records(directory: str, split: str) -> Any:
    """Opens a split, once per process; reading a record reads one block of a file."""
    builder, file_format = _builder(directory), "array_record"
    return builder.as_data_source(
        split, decoders=source.encoded_images(), file_format=file_format
    )


@dataclasses.dataclass(frozen=True)
class Splits:
    """The splits of a data set.

    Attributes:
      test: None if a share of `train` takes its place.
      minival: None if the data set has none of its own.
    """

    classes: tuple[str, ...]
    train: Records
    test: Records | None
    minival: Records | None = None


def from_folder(path: str, test_share: float = 0.0) -> Splits:
    """Returns the splits of an image folder, see `layout.find`."""
    found = layout_lib.find(path, test_share)

    def files(split: layout_lib.ByClass) -> Files:
        paths, labels = found.files(split)
        names = tuple(str(path) for path in paths)
        return Files(names, labels.astype(np.int32), found.classes)

    minival = files(found.minival) if found.minival else None
    return Splits(found.classes, files(found.train), files(found.test), minival)


def from_tfds(name: str, data_dir: str, test_share: float = 0.0) -> Splits:
    """Returns the splits of a tfds data set, preparing it if needed.

    Raises:
      DataError: see `lakd_jax.data.tfds.source.load`.
    """
    builder = source.prepared_builder(name, data_dir)
    classes = source.classes(builder, name)
    test = source.test_split(builder, name, test_share)
    test_records = _prepared(builder, test) if test else None
    return Splits(classes, _prepared(builder, "train"), test_records)


def _prepared(builder: Any, split: str) -> Prepared:
    paths, locations = builder.info.splits[split].filepaths, None
    if "array_record" in source.formats(builder):
        # Counted in the files, since tfds's source reports the prepared number.
        count = sum(map(_array_record_count, paths))
    else:
        locations = source.tfrecord_locations(paths)
        count = len(locations)
    source.require_complete(builder, split, count)
    return Prepared(str(builder.data_dir), split, locations)


def _array_record_count(path: Any) -> int:
    """Returns the number of records in a file; 0 if it is missing or truncated."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    if not reader.ok():  # then closing it fails as well
        return 0
    count = reader.num_records()
    reader.close()
    return count
