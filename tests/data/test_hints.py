"""What is said of arrays, names, sizes and scripts that are nearly right."""

import multiprocessing
import sys
import types

import jax
import numpy as np
import pytest
import test_data_arrays as arrays
import test_data_tfds_other as other
import tiny

from lakd_jax import data, errors, models
from lakd_jax.config import check
from lakd_jax.data import sources
from lakd_jax.data.streaming import batches, workers
from lakd_jax.runs import command

IMAGES = np.arange(12 * 8 * 8 * 3, dtype=np.uint8).reshape(12, 8, 8, 3)
LABELS = np.arange(12) % 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": IMAGES[..., 0]}, r"np.repeat\(images\[..., None\], 3"),
        ({"train_images": IMAGES[..., :1]}, r"np.repeat\(images, 3, axis=-1\)"),
        ({"train_images": IMAGES / 255}, r"\(images \* 255\).round"),
        ({"train_images": IMAGES.astype(int)}, r"images.round\(\).astype"),
        ({"train_images": IMAGES - 128.0}, "values from -128 to 127"),
        ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"transpose\(0, 2, 3, 1\)"),
        ({"train_images": IMAGES.repeat(2, -1)[..., :4]}, r"images\[..., :3\]"),
        ({"train_images": IMAGES.reshape(12, -1)}, "reshape"),
        ({"train_labels": np.eye(3)[LABELS]}, r"labels.argmax\(axis=1\)"),
        ({"train_labels": LABELS.astype(float)}, r"labels.astype\(int\)"),
        ({"train_labels": LABELS.astype(str)}, "np.unique"),
        ({"test_labels": np.full(6, -1)}, "data.test_share"),
        ({"train_labels": LABELS + 1}, "Subtract 1"),
        ({"classes": ["a", "b", "a"]}, "'a' more than once"),
        ({"classes": np.array(list("abc"), object)}, r"np.array\(..., dtype=str\)"),
        ({"test_images": None, "test_labels": None}, "set data.test_share"),
        ({"train_images": None, "x_train": IMAGES}, "It has test_images.* x_train"),
    ],
)
def test_a_hint_fits_the_array(changes, words, tmp_path):
    with pytest.raises(errors.DataError, match=f"(?s)mine.npz: .*{words}"):
        arrays.loaded(tmp_path, arrays.arrays(**changes))


def test_columns_of_labels_and_names_as_bytes_are_read(tmp_path):
    labels = {"train_labels": LABELS[:, None], "test_labels": LABELS[:6, None]}
    made = arrays.arrays(classes=np.array([b"a", b"b", b"c"]), **labels)
    found = arrays.loaded(tmp_path, made)
    assert found.classes == ("a", "b", "c")
    np.testing.assert_array_equal(found.train.labels, LABELS)


def test_arrays_of_one_split_are_shared(tmp_path, capsys):
    made = arrays.arrays(test_images=None, test_labels=None, notes=np.zeros(3))
    found = arrays.loaded(tmp_path, made, test_share=0.25)
    assert found.test.labels.tolist() == [0, 1, 2] and len(found.train) == 9
    np.testing.assert_array_equal(
        found.test.images, made["train_images"][found.test.ids]
    )
    assert "left out arrays notes" in capsys.readouterr().err
    with pytest.raises(errors.DataError, match="set it to 0, or leave them out"):
        arrays.loaded(tmp_path, arrays.arrays(), test_share=0.25)


# ------------------------------------------------------------------------------ tfds


def failure_of(name, data_dir):
    with pytest.raises(errors.DataError) as caught:
        data.load(name, data_dir=str(data_dir))
    return str(caught.value)


def test_a_prepared_set_of_one_split_is_shared(tmp_path):
    other.prepare_own(tmp_path, {"train": other.grey_examples(20)})
    options = {"data_dir": str(tmp_path), "test_share": 0.2}
    assert "Set data.test_share" in failure_of("homemade", tmp_path)
    found = data.load("homemade", **options)
    assert len(found.train) == 16 and sorted(found.test.labels) == [0, 0, 1, 1]
    assert not set(found.train.ids) & set(found.test.ids)
    np.testing.assert_array_equal(
        found.test.images[:, 0, 0, 0], found.test.images[:, -1, -1, -1]
    )
    views = batches.Views(6, (1.0, 1.0), 6)
    stream = batches.load("homemade", views, minival=0.25, workers=0, **options)
    parts = [stream.train.chosen, stream.minival.chosen, stream.test.chosen]
    assert list(map(len, parts)) == [12, 4, 4]
    assert sorted(np.concatenate(parts)) == list(range(20))


def test_splits_that_are_not_used_are_named(tmp_path, capsys):
    splits = {name: other.grey_examples(4) for name in ("train", "test", "extra")}
    other.prepare_own(tmp_path, splits)
    data.load("homemade", data_dir=str(tmp_path))
    assert "left out its splits extra" in capsys.readouterr().err
    with pytest.raises(errors.DataError, match="homemade has test: set it to 0"):
        data.load("homemade", data_dir=str(tmp_path), test_share=0.2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar-10", "did you mean 'cifar10'"),
        ("CIFAR10", "did you mean 'cifar10'"),
        ("SVHN-Cropped", "did you mean 'svhn_cropped'"),
        ("cifar10[:80%]", "Give 'cifar10', which is read completely"),
        ("homemade/train", "If train is a split: give 'homemade'"),
    ],
)
def test_names_that_are_nearly_right(name, words, tmp_path):
    assert words in failure_of(name, tmp_path)


# --------------------------------------------------------------- scripts, sizes, fields


def test_a_script_without_a_guard_is_refused_before_it_runs_again(
    tmp_path, monkeypatch
):
    script = tmp_path / "script.py"
    monkeypatch.setitem(
        sys.modules, "__main__", types.SimpleNamespace(__file__=str(script))
    )
    script.write_text("print(__name__)\nlakd_jax.train(config, 'r')\n")
    views = batches.Views(8, (1.0, 1.0), 8)
    options = {"minival": 0, "data_dir": "", "workers": 1}
    with pytest.raises(errors.DataError, match=r"data\.workers: .*script\.py") as found:
        batches.load(f"folder:{tmp_path}", views, **options)
    assert workers.GUARD in str(found.value) and "data.workers=0" in str(found.value)
    script.write_text('if __name__ == "__main__":\n    main()\n')
    workers.require_guard()


def test_a_worker_that_trains_while_it_starts_is_refused(monkeypatch, tmp_path):
    workers.refuse_in_worker()
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)
    with pytest.raises(errors.DataError, match="imports a script that trains"):
        command.run(tiny.config(tmp_path), tmp_path / "run")


def test_images_that_a_network_shrinks_to_nothing_are_refused():
    def shapes(name, *size):
        model = models.create(name, num_classes=2)
        images = jax.ShapeDtypeStruct((2, *size, 3), np.float32)
        key = jax.random.key(0)
        jax.eval_shape(lambda x: model.init(key, x, train=False), images)

    for name, size in {"vgg8": (8, 12), "hme": (8, 8), "resnet8": (1, 1)}.items():
        shapes(name, *size)
    for name in ("vgg8", "hme"):
        words = f"{name} needs images of at least 8x8 pixels, these are 7x12"
        with pytest.raises(errors.DataError, match=words):
            shapes(name, 7, 12)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data__std", (63.0, 62.0, 66.0), "divide by 255"),
        ("data__std", (0.2, 1.5, 0.2), "from 0 to 1, is 1.5"),
        ("data__std", (0.2, 0.0, 0.2), "must be above 0"),
        ("data__mean", (125.0, 122.0, 113.0), "divide by 255"),
        ("teacher__std", (63.0, 62.0, 66.0), "divide by 255"),
        ("data__test_share", 1.0, "data.test_share must be from 0 to below 1"),
    ],
)
def test_pixel_statistics_are_of_pixels_in_0_to_1(field, value, words, tmp_path):
    sources.register("tiny", lambda rest, size: tiny.dataset())
    (found,) = check.problems(tiny.config(tmp_path, **{field: value}), 1)
    assert words in found and field.replace("__", ".") in found
