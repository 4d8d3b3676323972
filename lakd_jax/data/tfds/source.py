"""Reads data sets of TensorFlow Datasets without TensorFlow."""

import dataclasses
import difflib
import functools
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from lakd_jax import errors, paths
from lakd_jax.data import dataset, images, notes
from lakd_jax.data.tfds import builders, imagenet

_READ_BATCH = 1024


def load(
    name: str,
    image_size: int,
    data_dir: str,
    *,
    max_bad: int = 0,
    orient: bool = True,
    test_share: float = 0.0,
) -> dataset.Dataset:
    """Reads a tfds data set, preparing it if needed.

    cifar10, cifar100, svhn_cropped and imagenet2012 are prepared by this package;
    others must exist in `data_dir` as ArrayRecord or TFRecord, or TensorFlow must be
    installed to prepare them. The `validation` split replaces a `test` split that is
    missing or unlabelled. An example's id is its position in the prepared files.

    Args:
      name: a tfds name, "set", "set/config" or "set:version".
      image_size: height and width in pixels, 0 to keep the images' size.
      data_dir: tfds's data directory, "" for its default.
      max_bad: how many undecodable training images may be skipped.
      orient: whether to turn photos as their EXIF tag says.
      test_share: share of the images that is tested on, of a set with one split.

    Raises:
      DataError: the name is unknown, the data set is not prepared and cannot be
        prepared here or is not for image classification, or files are damaged.
    """
    builder = prepared_builder(name, data_dir)
    names = classes(builder, name)
    test_name = test_split(builder, name, test_share)
    decode = functools.partial(_decode, image_size=image_size, orient=orient)
    # No test image may be skipped: results are for the complete test split.
    if test_name:
        train = decode(_read(builder, "train"), max_bad=max_bad)
        test = decode(_read(builder, test_name))
    else:
        everything = _read(builder, "train")
        mask = dataset.mask_of_share(everything.labels, test_share, "data.test_share")
        train = decode(everything, mask=~mask, max_bad=max_bad)
        test = decode(everything, mask=mask)
    if train.shape != test.shape:
        raise errors.DataError(
            f"{name}: training images are {train.shape[:2]} pixels, test "
            f"images {test.shape[:2]}. Set data.image_size to resize them."
        )
    return dataset.Dataset(name, names, train, None, test)


def prepared_builder(name: str, data_dir: str) -> Any:
    """Returns the builder of a data set, preparing it if needed.

    Args:
      name: as for `load`.
      data_dir: tfds's data directory, "" for its default.

    Raises:
      ConfigError: `data_dir` is not a local path.
      DataError: the name is unknown, or the data set cannot be prepared here or is
        prepared in a format that cannot be read.
    """
    if data_dir:
        data_dir = str(paths.local(data_dir, "data.data_dir"))
    builder = _open(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder, name, data_dir)
        builder = _open(name, data_dir)
    _check_format(builder, name)
    return builder


def has_tensorflow() -> bool:
    """Returns whether TensorFlow is installed, without importing it."""
    return importlib.util.find_spec("tensorflow") is not None


def _open(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    if "[" in name:
        raise errors.DataError(
            f"data.source={name!r}: parts of a set cannot be named. Give "
            f"{name.partition('[')[0]!r}, which is read completely; data.minival holds "
            "out a share of train, data.test_share a share of a set with one split."
        )
    try:
        parsed, _ = tfds.core.naming.parse_builder_name_kwargs(name)
        if parsed.namespace:  # tfds would download and run the builder's code
            raise ValueError(
                f"community data sets ({parsed.namespace}:) come with code of "
                "their own, which is not run here; prepare it elsewhere and set "
                "data.data_dir"
            )
        return tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # a wrong config or version, a damaged info file
        if (near := _same_letters(name)) != name:
            fault = f" is no data set of tfds; did you mean {near!r}?"
        elif isinstance(error, tfds.core.registered.DatasetNotFoundError):
            fault = _unknown(name, data_dir)
        else:
            fault = f": {builders.brief(error)}"
        raise errors.DataError(f"data.source={name!r}{fault}") from error


def _known() -> list[str]:
    import tensorflow_datasets as tfds

    return [*tfds.list_builders(with_community_datasets=False), "digits"]


def _same_letters(name: str) -> str:
    """Returns the known set that a name such as CIFAR-10 means; else the name."""

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text)).lower()

    return next((k for k in _known() if plain(k) == plain(name)), name)


def _unknown(name: str, data_dir: str) -> str:
    stem, _, rest = name.partition("/")
    near = difflib.get_close_matches(name, _known(), n=4, cutoff=0.5)
    return (
        f" is no data set of tfds, nor prepared in {data_dir or 'its data directory'}. "
        + (f"Nearest: {', '.join(near)}. " if near else "")
        + (
            f"If {rest} is a split: give {stem!r}, whose train and test are read. "
            if rest in ("train", "test", "validation")
            else ""
        )
        + "For image folders write folder:PATH."
    )


def _prepare(builder: Any, name: str, data_dir: str) -> None:
    """Prepares the data set with this package's reader if it has one, else tfds's."""
    import tensorflow_datasets as tfds

    if builder.name in builders.URLS:
        builders.prepare(builder.name, data_dir or None)
        return
    if builder.name == imagenet.NAME:
        imagenet.prepare(data_dir or None)
        return
    if not has_tensorflow():
        raise errors.DataError(
            f"{name} is not prepared in {builder.data_dir}, and tfds needs TensorFlow "
            "to prepare it.\nInstall it with `pip install lakd-jax[tf]`, or prepare "
            "the data set on another machine by\n"
            f"`tfds build {name} --file_format=array_record` and copy that directory."
        )
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builders.run(builder, download_config=config, file_format="array_record")


def formats(builder: Any) -> set[str]:
    """Returns the file formats in which a data set is prepared."""
    return {fmt.value for fmt in builder.info.available_file_formats()}


def _check_format(builder: Any, name: str) -> None:
    if not builder.info.splits:
        raise errors.DataError(
            f"{builder.data_dir} has no complete data set: delete it and start again."
        )
    found = formats(builder)
    if not found & {"array_record", "tfrecord"}:
        raise errors.DataError(
            f"{name} is prepared in {builder.data_dir} as "
            f"{', '.join(sorted(found))}, which cannot be read.\nDelete it or set "
            "another data.data_dir, and prepare it by\n"
            f"`tfds build {name} --file_format=array_record`."
        )


def classes(builder: Any, name: str) -> tuple[str, ...]:
    """Returns the class names; raises DataError unless it is for classification."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    label = features["label"] if "label" in features else None
    image = features["image"] if "image" in features else None
    if (
        not isinstance(label, tfds.features.ClassLabel)
        or not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
    ):
        raise errors.DataError(
            f"{name} is not for image classification: it needs the features `image` "
            f"(8-bit) and `label` (a class), and has {', '.join(features)}."
        )
    return tuple(label.names)


def test_split(builder: Any, name: str, test_share: float = 0.0) -> str:
    """Returns the labelled split to test on, `test` or `validation`.

    Prints which splits are not used.

    Args:
      builder: of the data set.
      name: of the data set, for messages.
      test_share: share of `train` to test on; "" is then returned.

    Raises:
      DataError: there is no labelled split but `test_share` is 0, or the other way
        around.
    """
    found = ""
    for split in ("test", "validation"):
        if split in builder.info.splits and not found:
            _, labels = _records(builder, split, limit=1)
            if labels and labels[0] >= 0:  # tfds writes -1 if labels are secret
                found = split
    if test_share and found:
        raise errors.DataError(
            f"data.test_share={test_share:g} is for data without a test split; "
            f"{name} has {found}: set it to 0."
        )
    if not found and not test_share:
        raise errors.DataError(
            f"{name} has no labelled test or validation split, only "
            f"{', '.join(builder.info.splits)}. Set data.test_share, e.g. to 0.2, to "
            "test on a share of train."
        )
    if left := sorted(set(builder.info.splits) - {"train", found}):
        notes.note(f"{name}: left out its splits {notes.listed(left)}")
    return found


def encoded_images() -> dict[str, Any]:
    """Returns the decoders with which tfds leaves images encoded.

    The stored bytes are decoded by this package: tfds's decoder depends on whether
    OpenCV is installed, and has no image_size.
    """
    import tensorflow_datasets as tfds

    return {"image": tfds.decode.SkipDecoding()}


def _examples(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split in stored order, images still encoded."""
    raw = encoded_images()
    if "array_record" in formats(builder):
        source = builder.as_data_source(split, decoders=raw, file_format="array_record")
        for start in range(0, len(source), _READ_BATCH):
            stop = min(start + _READ_BATCH, len(source))
            yield from source.__getitems__(range(start, stop))
        return
    features = builder.info.features
    for path in builder.info.splits[split].filepaths:
        locations = tfrecord_locations([path])
        with path.open("rb") as file:
            for _, offset, length in locations.tolist():
                file.seek(offset)
                record = file.read(length)
                yield features.deserialize_example_np(record, decoders=raw)


def tfrecord_locations(paths: list[Any]) -> np.ndarray:
    """Returns file, offset and length of every record, (N, 3) int64.

    tfds needs TensorFlow to read TFRecord files. A record is its length (8 bytes,
    little-endian), a checksum of the length (4), the content, and a checksum of the
    content (4). The checksums (masked CRC-32C, not in the standard library) are not
    verified. Reads only the lengths: one seek per record, no content.

    Raises:
      DataError: a file ends within a record.
    """
    locations = []
    for number, path in enumerate(paths):
        size = path.stat().length
        with path.open("rb") as file:
            offset = 0
            while header := file.read(12):
                length = int.from_bytes(header[:8], "little")
                end = offset + 12 + length + 4
                if len(header) < 12 or end > size:
                    raise errors.DataError(
                        f"{path} ends within a record. Delete the directory and "
                        "prepare the data set again."
                    )
                locations.append((number, offset + 12, length))
                file.seek(offset := end)
    return np.array(locations, np.int64).reshape(-1, 3)


def require_complete(builder: Any, split: str, count: int) -> None:
    """Raises DataError if `count` is less than the examples prepared, or 0."""
    expected = builder.info.splits[split].num_examples
    if count < max(expected, 1):
        raise errors.DataError(
            f"{builder.name} {split}: {count} examples in {builder.data_dir} where "
            f"{expected} were prepared: the directory is incomplete. Delete it and "
            "start again."
        )


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A split as it is stored: encoded images and their labels (N,)."""

    name: str
    images: list[bytes]
    labels: np.ndarray


def _read(builder: Any, split: str) -> _Encoded:
    """Reads the records of one split into memory."""
    split_name = f"{builder.name} {split}"
    if split not in builder.info.splits:
        raise errors.DataError(
            f"{builder.name} has no split {split!r}, only "
            f"{', '.join(builder.info.splits)}."
        )
    encoded, labels = _records(builder, split)
    require_complete(builder, split, len(labels))
    return _Encoded(split_name, encoded, np.asarray(labels))


def _decode(
    split: _Encoded,
    *,
    image_size: int,
    orient: bool,
    mask: np.ndarray | None = None,
    max_bad: int = 0,
) -> dataset.Split:
    """Decodes a split, or those of its examples that `mask` selects."""
    ids = np.arange(len(split.labels)) if mask is None else np.flatnonzero(mask)
    pixels, good = images.decode_all(
        [split.images[i] for i in ids],
        lambda i: f"{split.name}, example {ids[i]}",
        image_size,
        split.name,
        max_bad,
        orient,
    )
    return dataset.new_split(pixels, split.labels[ids[good]], ids[good])


def _records(
    builder: Any, split: str, limit: int | None = None
) -> tuple[list[bytes], list[int]]:
    """Returns the encoded images and labels of a split, or of its first `limit`."""
    encoded, labels = [], []
    try:
        for example in itertools.islice(_examples(builder, split), limit):
            encoded.append(example["image"])
            labels.append(int(example["label"]))
    except errors.DataError:
        raise
    except Exception as error:  # missing, truncated or foreign files
        raise errors.DataError(
            f"{builder.name} {split}: cannot be read from {builder.data_dir} "
            f"({builders.brief(error)}). Delete the directory and start again."
        ) from error
    return encoded, labels
