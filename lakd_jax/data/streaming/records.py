"""Encoded images that can be read one by one, in any order, by any process.

Objects of this module travel to decoding processes, so they hold paths and offsets and
open their files where they are used. None of it needs TensorFlow.
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
        """How many there are."""
        ...

    def read(self, index: int) -> tuple[str | bytes, int]:
        """A path or the encoded bytes of an image, and its label."""
        ...

    def name(self, index: int) -> str:
        """What an error calls this example."""
        ...

    def fingerprint(self) -> str:
        """Changes with the names, sizes or number of the files."""
        ...


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files with a label each."""

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
        """See `Records`; of where the files lie only their last two names count."""
        paths = map(pathlib.Path, self.paths)
        told = (f"{p.parent.name}/{p.name} {p.stat().st_size}" for p in paths)
        return digest("\n".join(told))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A split of a set that tfds has prepared, as ArrayRecord or TFRecord.

    Attributes:
      directory: of the prepared version.
      split: its name.
      places: of TFRecords, (N, 3) int64: file, offset and length of each record, see
        `tfrecord_places`; None for ArrayRecord, which has its own index.
    """

    directory: str
    split: str
    places: np.ndarray | None

    def __len__(self) -> int:
        if self.places is not None:
            return len(self.places)
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
                f"({builders.brief(error)}). Prepare the set again."
            ) from error
        return example["image"], int(example["label"])

    def _example(self, index: int) -> dict[str, Any]:
        if self.places is None:
            return _array_records(self.directory, self.split)[index]
        number, offset, length = (int(n) for n in self.places[index])
        path = _builder(self.directory).info.splits[self.split].filepaths[number]
        with path.open("rb") as file:
            file.seek(offset)
            record = file.read(length)
        if len(record) < length:
            raise EOFError(f"{path} ends within a record")
        features = _builder(self.directory).info.features
        return features.deserialize_example_np(record, decoders=_raw())

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
    """Sixteen hex digits that change with the text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _raw() -> dict[str, Any]:
    """Has tfds leave images encoded."""
    import tensorflow_datasets as tfds

    return {"image": tfds.decode.SkipDecoding()}


@functools.lru_cache(maxsize=4)
def _builder(directory: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory)


@functools.lru_cache(maxsize=4)
def _array_records(directory: str, split: str) -> Any:
    """Opened once a process; reading one record is reading one block of the file."""
    builder, form = _builder(directory), "array_record"
    return builder.as_data_source(split, decoders=_raw(), file_format=form)


def from_folder(path: str) -> tuple[tuple[str, ...], Files, Files]:
    """(classes, train, test) of an image folder, see `lakd_jax.data.folder`."""
    classes, listed = folder.listed(path)
    splits = []
    for files in listed:
        labels = np.repeat(np.arange(len(files)), [len(own) for own in files.values()])
        paths = tuple(str(p) for own in files.values() for p in own)
        splits.append(Files(paths, labels.astype(np.int32)))
    return classes, splits[0], splits[1]


def from_tfds(name: str, data_dir: str) -> tuple[tuple[str, ...], Prepared, Prepared]:
    """(classes, train, test) of a tfds set, which is prepared first if need be.

    Raises:
      DataError: see `tfds_source.load`.
    """
    builder = source.prepared(name, data_dir)
    classes = source.classes(builder, name)
    test = source.test_split(builder, name)
    return classes, _prepared(builder, "train"), _prepared(builder, test)


def _prepared(builder: Any, split: str) -> Prepared:
    paths, places = builder.info.splits[split].filepaths, None
    if "array_record" in source.formats(builder):
        # Counted in the files: tfds's own source repeats what was prepared.
        count = sum(map(_array_record_count, paths))
    else:
        places = tfrecord_places(paths)
        count = len(places)
    expected = builder.info.splits[split].num_examples
    if count < max(expected, 1):
        raise errors.DataError(
            f"{builder.name} {split}: {count} examples in {builder.data_dir} "
            f"where {expected} were prepared: the directory is incomplete. Delete it "
            "and start again."
        )
    return Prepared(str(builder.data_dir), split, places)


def _array_record_count(path: Any) -> int:
    """How many records a file holds; 0 of one that is missing or cut short."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    if not reader.ok():  # then closing it fails, too
        return 0
    count = reader.num_records()
    reader.close()
    return count


def tfrecord_places(paths: list[Any]) -> np.ndarray:
    """File, offset and length of every record, (N, 3) int64.

    Only the records' lengths are read: a seek each, no content.
    """
    places = []
    for number, path in enumerate(paths):
        size = path.stat().length
        with path.open("rb") as file:
            offset = 0
            while header := file.read(12):
                length = int.from_bytes(header[:8], "little")
                end = offset + 12 + length + 4  # two checksums, see `tfrecords`
                if len(header) < 12 or end > size:
                    raise errors.DataError(
                        f"{path} ends within a record. Delete the directory and "
                        "prepare the set again."
                    )
                places.append((number, offset + 12, length))
                file.seek(offset := end)
    return np.array(places, np.int64).reshape(-1, 3)
