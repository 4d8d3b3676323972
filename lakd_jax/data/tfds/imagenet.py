"""Prepares imagenet2012 without TensorFlow, from the archives of its site.

tfds's builder reads the archives through TensorFlow. This subclass keeps its name,
version, features and order, but reads them with the standard library, and writes
ArrayRecord files, which the stock builder can open. There are two differences: the 23
training images that are not RGB JPEGs (22 CMYK, one PNG) are stored unchanged, since
they are converted when decoded; and there is no `test` split, whose labels are secret.
"""

import functools
import io
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

from lakd_jax import errors
from lakd_jax.data.tfds import builders

NAME = "imagenet2012"
ARCHIVES = {
    "train": "ILSVRC2012_img_train.tar",
    "validation": "ILSVRC2012_img_val.tar",
}


class _ImageNet:
    """Reads the archive of one archive per class, and that of the validation images."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        paths = archives(pathlib.Path(dl_manager.manual_dir))
        return {
            "train": self._generate_examples(paths["train"], {}),
            "validation": self._generate_examples(
                paths["validation"], validation_labels(paths["validation"])
            ),
        }

    def _generate_examples(
        self, path: pathlib.Path, labels: dict[str, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields examples; without `labels` every member is the archive of a class."""
        for name, content in builders.members(path.open("rb")):
            inner = [(name, content)]
            if not labels:
                inner = builders.members(io.BytesIO(content))
            for image, pixels in inner:
                label = labels[image] if labels else pathlib.PurePath(name).stem
                record = {"file_name": image, "image": pixels, "label": label}
                yield image, record


def archives(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the paths of the archives; raises DataError naming the missing ones."""
    paths = {split: folder / name for split, name in ARCHIVES.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise errors.DataError(
            f"{NAME} cannot be downloaded without an account: get "
            f"{' and '.join(missing)}\nfrom https://image-net.org/download-images, put "
            f"them into {folder} and start again."
        )
    return paths


@functools.cache
def class_names() -> tuple[str, ...]:
    """Returns the 1,000 classes (n01440764, ...), sorted: also PyTorch's order."""
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    return tuple(labels.read_text().split())


def validation_labels(path: pathlib.Path) -> dict[str, str]:
    """Returns image -> class; tfds lists the classes in order of the image names."""
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    with tarfile.open(path, "r:") as archive:
        names = sorted(member.name for member in archive if member.isfile())
    return dict(zip(names, labels.read_text().split(), strict=False))


@functools.cache
def builder_class() -> type:
    """Returns the subclass, which is kept out of tfds's registry of stock builders."""
    import tensorflow_datasets as tfds

    stock = tfds.builder_cls(NAME)
    package = {"pkg_dir_path": stock.pkg_dir_path, "__module__": __name__}
    with tfds.core.registered.skip_registration():
        return type("Builder", (_ImageNet, stock), {"name": NAME, **package})


def prepare(data_dir: str | None) -> None:
    """Writes the data set as ArrayRecord, which takes some hours and 150 GB.

    Args:
      data_dir: tfds's data directory, None for its default; the archives must be in
        its subfolder downloads/manual.

    Raises:
      DataError: an archive is missing or broken, or the disk is full.
    """
    import tensorflow_datasets as tfds

    builder = builder_class()(data_dir=data_dir, file_format="array_record")
    folder = pathlib.Path(builder.data_dir_root) / "downloads" / "manual"
    archives(folder)
    config = tfds.download.DownloadConfig(manual_dir=str(folder))
    advice = f"Check that the archives in {folder} are complete."
    builders.run(builder, advice, download_config=config)
