"""tfds data sets that were prepared elsewhere."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
import test_data_tfds as cifar

from lakd_jax import data, errors
from lakd_jax.data.streaming import records
from lakd_jax.data.tfds import builders

FEATURES = {
    "image": tfds.features.Image(shape=(6, 6, 1)),
    "label": tfds.features.ClassLabel(names=["even", "odd"]),
}


def prepare_own(data_dir: pathlib.Path, splits: dict, features=FEATURES) -> None:
    """Prepares a data set that is not part of tfds, as a user would."""
    fields = {
        "name": "homemade",
        "VERSION": tfds.core.Version("1.0.0"),
        "__module__": __name__,
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        ),
        "_split_generators": lambda self, _: {
            name: enumerate(examples) for name, examples in splits.items()
        },
        "_generate_examples": lambda self: None,
    }
    with tfds.core.registered.skip_registration():
        cls = type("Homemade", (tfds.core.GeneratorBasedBuilder,), fields)
    cls(data_dir=data_dir, file_format="array_record").download_and_prepare()


def grey_examples(count: int, label: int | None = None) -> list[dict]:
    return [
        {
            "image": builders.to_png(np.full((6, 6), 10 * k, np.uint8)),
            "label": k % 2 if label is None else label,
        }
        for k in range(count)
    ]


def parts(train: int = 8, test: int = 4) -> dict[str, list[dict]]:
    """Returns the examples of two splits of these lengths."""
    return {"train": grey_examples(train), "test": grey_examples(test)}


def test_any_prepared_set_is_used_and_grey_becomes_rgb(tmp_path):
    prepare_own(tmp_path, parts())
    found = data.load("homemade", data_dir=str(tmp_path))
    assert found.classes == ("even", "odd")
    assert found.train.images.shape == (8, 6, 6, 3)
    np.testing.assert_array_equal(
        found.train.labels, found.train.images[:, 0, 0, 0] // 10 % 2
    )
    assert (found.train.images == found.train.images[..., :1]).all()


def test_validation_replaces_a_test_split_without_labels(tmp_path):
    secret = {"validation": grey_examples(3), "test": grey_examples(5, label=-1)}
    prepare_own(tmp_path, parts() | secret)
    assert len(data.load("homemade", data_dir=str(tmp_path)).test) == 3


def test_sets_without_a_test_split_are_refused(tmp_path):
    prepare_own(tmp_path, {"train": grey_examples(8)})
    assert "no labelled test" in cifar.failure("homemade", tmp_path)


def test_sets_without_images_and_labels_are_refused(tmp_path):
    splits = {"train": [{"text": "a"}], "test": [{"text": "b"}]}
    prepare_own(tmp_path, splits, {"text": tfds.features.Text()})
    assert (
        "`image`" in (message := cifar.failure("homemade", tmp_path))
        and "text" in message
    )


def test_undecodable_examples_are_named(tmp_path, capsys):
    """Promise 31: by data set, split and number."""
    splits = parts()
    splits["train"][3]["image"] = b"broken"
    prepare_own(tmp_path, splits)
    assert "homemade train, example" in cifar.failure("homemade", tmp_path)
    found = data.load("homemade", data_dir=str(tmp_path), max_bad=1)
    assert len(found.train) == 7 and len(set(found.train.ids)) == 7
    assert "1 of 8 images left out (data.max_bad=1)" in capsys.readouterr().err


def test_undecodable_test_images_are_never_left_out(tmp_path):
    """Promise 31: results are for the complete test split."""
    splits = parts()
    splits["test"][1]["image"] = b"broken"
    prepare_own(tmp_path, splits)
    with pytest.raises(errors.DataError, match="homemade test, example"):
        data.load("homemade", data_dir=str(tmp_path), max_bad=5)


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_streamed_sets_lack_no_example(form, tmp_path):
    """Promise 32: the number of examples is that of the preparation."""
    prepare_own(tmp_path, parts())
    if form == "tfrecord":
        cifar.as_tfrecords(tmp_path)
    records.from_tfds("homemade", str(tmp_path))
    (info,) = tmp_path.rglob("dataset_info.json")
    text = info.read_text()
    assert text.count('"8"') == 1  # the length of the shard of train
    info.write_text(text.replace('"8"', '"9"'))
    with pytest.raises(errors.DataError, match="8 examples .* where 9 were prepared"):
        records.from_tfds("homemade", str(tmp_path))


def test_a_streamed_shard_cut_short_is_an_error(tmp_path):
    """Promise 32: reported before the first example is read."""
    prepare_own(tmp_path, parts())
    (shard,) = tmp_path.rglob("homemade-train.array_record*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    for _ in range(2):  # cut short, then lost
        with pytest.raises(errors.DataError, match="0 examples .* where 8 were prep"):
            records.from_tfds("homemade", str(tmp_path))
        shard.unlink(missing_ok=True)
