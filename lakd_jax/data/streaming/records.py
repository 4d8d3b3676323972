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
from lakd_jax.data import folder
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
    """Image files, each with a label."""

    paths: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[str | bytes, int]:
        """See `Records`."""
        return self.paths[index], int(self.labels[index])

    def name(self, index: int) -> str:
        """See `Records`."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """See `Records`; uses only the last two components of every path."""
        paths = map(pathlib.Path, self.paths)
        lines = (f"{p.parent.name}/{p.name} {p.stat().st_size}" for p in paths)
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


def from_folder(path: str) -> tuple[tuple[str, ...], Files, Files]:
    """Returns (classes, train, test) of an image folder, see `lakd_jax.data.folder`."""
    classes, both_splits = folder.list_files(path)
    splits = []
    for files in both_splits:
        counts = [len(paths) for paths in files.values()]
        labels = np.repeat(np.arange(len(files)), counts)
        paths = tuple(str(path) for paths in files.values() for path in paths)
        splits.append(Files(paths, labels.astype(np.int32)))
    return classes, splits[0], splits[1]


def from_tfds(name: str, data_dir: str) -> tuple[tuple[str, ...], Prepared, Prepared]:
    """Returns (classes, train, test) of a tfds data set, preparing it if needed.

    Raises:
      DataError: see `lakd_jax.data.tfds.source.load`.
    """
    builder = source.prepared_builder(name, data_dir)
    classes = source.classes(builder, name)
    test = source.test_split(builder, name)
    return classes, _prepared(builder, "train"), _prepared(builder, test)


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
