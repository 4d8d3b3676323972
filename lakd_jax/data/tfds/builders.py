"""Prepares CIFAR-10, CIFAR-100 and SVHN without TensorFlow.

tfds's builders unpack and read their archives through TensorFlow and yield images as
arrays, which it encodes. These subclasses keep their names, versions, features, URLs
and checksums, but read the archives with the standard library and SciPy and yield PNG
bytes. The resulting ArrayRecord files can be opened by the stock builders.
"""

import functools
import io
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from lakd_jax import errors

# The extra split of svhn_cropped (531,131 images, 1.3 GB) is omitted.
URLS = {
    "cifar10": {"all": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"},
    "cifar100": {"all": "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"},
    "svhn_cropped": {
        "train": "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        "test": "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
    },
}

_PIXELS = 32 * 32 * 3
_RETRIES = 5  # tfds's 10 take more than three minutes to give up


class _Cifar:
    """Reads CIFAR's binary version directly from the tar stream."""

    name: str
    info: Any
    _cifar_info: Any

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        table = self._cifar_info  # tfds's names of members and labels
        path = dl_manager.download(URLS[self.name]["all"])
        names = [*table.label_files, *table.train_files, *table.test_files]
        files = read_members(path, [table.prefix + name for name in names])
        for key, name in zip(table.label_keys, table.label_files, strict=True):
            text = files[table.prefix + name].decode()
            self.info.features[key].names = [n for n in text.split("\n") if n]

        def examples(role: str, names: list[str]) -> Iterator[tuple[int, dict]]:
            content = b"".join(files[table.prefix + name] for name in names)
            return self._generate_examples(role, content)

        return {
            "train": examples("train", table.train_files),
            "test": examples("test", table.test_files),
        }

    def _generate_examples(
        self, role: str, content: bytes
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        keys = self._cifar_info.label_keys
        # A record is one byte per label, then the red, green and blue planes.
        records = np.frombuffer(content, np.uint8).reshape(-1, len(keys) + _PIXELS)
        for index, record in enumerate(records):
            planes = record[len(keys) :].reshape(3, 32, 32)
            labels = dict(zip(keys, map(int, record), strict=False))
            image = to_png(planes.transpose(1, 2, 0))
            yield index, {"id": f"{role}_{index:05d}", "image": image, **labels}


class _Svhn:
    """Reads SVHN's MATLAB files, in which the digit 0 is stored as 10."""

    name: str

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        paths = dl_manager.download(URLS[self.name])
        return {role: self._generate_examples(role, p) for role, p in paths.items()}

    def _generate_examples(
        self, role: str, path: pathlib.Path
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from scipy import io as scipy_io

        with path.open("rb") as file:
            content = scipy_io.loadmat(file)
        images, labels = np.moveaxis(content["X"], -1, 0), content["y"].ravel()
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            example = {"image": to_png(image), "label": int(label) % 10}
            yield index, {"id": f"{role}_{index:06d}", **example}


_READERS = {"cifar10": _Cifar, "cifar100": _Cifar, "svhn_cropped": _Svhn}


@functools.cache
def builder_class(name: str) -> type:
    """Returns the subclass for one of the names in `URLS`.

    It is kept out of tfds's registry, where the stock builder stays.
    """
    import tensorflow_datasets as tfds

    stock = tfds.builder_cls(name)
    # tfds looks for checksums next to a builder's source: pass those of the stock one.
    fields = {"name": name, "url_infos": stock.url_infos, "__module__": __name__}
    with tfds.core.registered.skip_registration():
        return type(stock.__name__, (_READERS[name], stock), fields)


def prepare(name: str, data_dir: str | None) -> None:
    """Downloads a data set of `URLS` (checking sha256) and writes it as ArrayRecord.

    Args:
      name: name of the data set.
      data_dir: tfds's data directory, None for its default.

    Raises:
      DataError: the download, checksum, archive or disk is at fault.
    """
    import tensorflow_datasets as tfds

    builder = builder_class(name)(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(
        try_download_gcs=False, force_checksums_validation=True
    )
    manual = builder.data_dir_root / "downloads" / "manual"
    urls = "\n".join(f"  {url}" for url in URLS[name].values())
    advice = (
        f"If the network is the cause, put these files into {manual}\n"
        f"and start again:\n{urls}"
    )
    run(builder, advice, download_config=config)


def run(builder: Any, advice: str = "", **options: Any) -> None:
    """Downloads and prepares a data set by its builder, with these options.

    Raises:
      DataError: preparing failed; the message ends with `advice`.
    """
    from tensorflow_datasets.core.download import downloader as module

    downloader: Any = module  # its constant is typed as a literal
    before, downloader.MAX_RETRIES = downloader.MAX_RETRIES, _RETRIES
    try:
        builder.download_and_prepare(**options)
    except Exception as error:  # requests, tarfile, scipy, OS: each fails in its way
        text = f"{builder.name}: downloading and preparing failed: {brief(error)}"
        raise errors.DataError(f"{text}\n{advice}".rstrip()) from error
    finally:
        downloader.MAX_RETRIES = before


def read_members(path: pathlib.Path, names: list[str]) -> dict[str, bytes]:
    """Returns {name: content} of the named files of a .tar.gz, without unpacking it.

    Raises:
      DataError: a file is missing from the archive.
    """
    required = set(names)
    found = {name: data for name, data in members(path.open("rb")) if name in required}
    if missing := sorted(required - found.keys()):
        raise errors.DataError(f"{path} lacks {', '.join(missing)}")
    return found


def members(file: Any) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the files in a tar archive, without unpacking it."""
    with file, tarfile.open(fileobj=file) as archive:
        for member in archive:
            if member.isfile():
                reader = archive.extractfile(member)
                assert reader is not None  # it is a file
                yield member.name, reader.read()


def to_png(image: np.ndarray) -> bytes:
    """Encodes (H, W, 3) uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def brief(error: Exception) -> str:
    """Returns the error's message in one line of at most 600 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:600] + " ..."
