"""Preparing ImageNet's archives, and training on them, without TensorFlow."""

import collections
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
import test_data_tfds as cifar
import test_stream
import tiny
from PIL import Image

from lakd_jax import errors
from lakd_jax.data.streaming import batches
from lakd_jax.data.tfds import builders, imagenet
from lakd_jax.runs import command
from lakd_jax.runtime import mesh as mesh_lib

LONG = pytest.mark.long
CLASSES = ("n01440764", "n01443537", "n02105855")


def jpeg(rng, mode="RGB", form="JPEG") -> bytes:
    height, width = rng.integers(20, 60, 2)
    pixels = rng.integers(0, 255, (height, width, 4 if mode == "CMYK" else 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8), mode).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A tfds directory with archives like ILSVRC's, including CMYK and PNG images."""
    root, rng = tmp_path_factory.mktemp("tfds"), np.random.default_rng(0)
    manual = root / "downloads" / "manual"
    manual.mkdir(parents=True)
    parts = {}
    for name in CLASSES:
        members = {f"{name}_{i}.JPEG": jpeg(rng) for i in range(20)}
        parts[f"{name}.tar"] = cifar.tar(members)
    odd = {
        "n01739381_1309.JPEG": jpeg(rng, "CMYK"),
        "n01739381_1.JPEG": jpeg(rng, form="PNG"),
    }
    parts["n01739381.tar"] = cifar.tar(odd)
    (manual / imagenet.ARCHIVES["train"]).write_bytes(cifar.tar(parts))
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(rng) for i in (3, 1, 2, 4, 5)}
    (manual / imagenet.ARCHIVES["validation"]).write_bytes(cifar.tar(images))
    return root


def loaded(data_dir):
    arguments = {"minival": 0, "data_dir": str(data_dir), "workers": 0}
    return batches.load("imagenet2012", test_stream.VIEWS, **arguments)


def test_the_archives_are_prepared_as_tfds_would(data_dir):
    found = loaded(data_dir)
    assert (len(found.train), len(found.test)) == (62, 5)
    assert found.classes[:2] == CLASSES[:2] and len(found.classes) == 1000
    stock = tfds.builder("imagenet2012", data_dir=data_dir)
    assert stock.is_prepared() and stock.info.splits["train"].num_examples == 62
    split = found.train.take(np.arange(62))
    counts = collections.Counter(found.classes[label] for label in split.labels)
    assert counts == {name: 20 for name in CLASSES} | {"n01739381": 2}


def test_validation_labels_go_by_the_images_names(data_dir):
    manual = data_dir / "downloads" / "manual"
    labels = imagenet.validation_labels(manual / imagenet.ARCHIVES["validation"])
    file = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    first = file.read_text().split()[:5]
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 4, 5)]
    assert labels == dict(zip(names, first, strict=True))


def test_missing_archives_are_named(tmp_path):
    with pytest.raises(errors.DataError) as caught:
        loaded(tmp_path)
    text = str(caught.value)
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in text
    assert str(tmp_path / "downloads" / "manual") in text and text.count("\n") < 4


def test_names_in_archives_lead_nowhere(tmp_path):
    """Members are not unpacked, so a path out of the folder is only a name."""
    evil = cifar.tar({"../../evil.JPEG": b"x", "n01440764_1.JPEG": b"y"})
    path = tmp_path / "inner" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(evil)
    assert len(list(builders.members(path.open("rb")))) == 2
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "x.tar"]


@pytest.mark.parametrize("engine", ["fused", "dispatch", "pipeline"])
@LONG
def test_it_is_trained_on_with_every_engine(engine, data_dir, tmp_path, monkeypatch):
    """Trains four steps and evaluates; repeating the command returns the result."""
    mesh = test_stream.mesh_of(2 if engine == "pipeline" else 1)
    monkeypatch.setattr(mesh_lib, "data_mesh", lambda: mesh)
    fields = {
        "data__source": "imagenet2012",
        "data__data_dir": str(data_dir),
        "data__minival": 0.0,
        "local__engine": engine,
        "epochs": 1,
        "teacher__floor": 0.0,
        "optim__lr": 0.001,
    }
    streaming = test_stream.streaming("") | {"data__drop_last": False}
    settings = tiny.config(tmp_path, **(streaming | fields))
    floor = command.teacher_lib.teacher_floor
    monkeypatch.setattr(floor, "fault", lambda *_: "")
    lines = []
    result = command.run(settings, tmp_path / "run", notify=lines.append)
    assert result["test_last"]["examples"] == 5 and result["classes"] == 1000
    assert result == command.run(settings, tmp_path / "run", notify=lines.append)
    assert (tmp_path / "run" / "attention.png").stat().st_size > 1000
