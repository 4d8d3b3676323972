"""Streamed input: batches do not depend on who decodes them or on the first step."""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import time

import jax
import numpy as np
import pytest
import test_data_tfds as cifar
import test_data_tfds_other as other
import test_distributed as distributed
import test_train_resume as resume
import tiny
from jax.sharding import Mesh
from PIL import Image

from lakd_jax import data, errors
from lakd_jax.config import check
from lakd_jax.data import device
from lakd_jax.data.streaming import batches as batches_lib
from lakd_jax.data.streaming import crops, records
from lakd_jax.interop import weights
from lakd_jax.runs import command, single
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir
from lakd_jax.training import feeds
from lakd_jax.training import setup as setup_lib

VIEWS = batches_lib.Views(size=8, scale=(0.3, 1.0), shorter=10)
COUNTS = {"train": 30, "test": 7}
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of JPEGs of various sizes, some of them grey."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for role, count in COUNTS.items():
        for i, name in zip(range(3 * count), itertools.cycle(tiny.CLASSES)):
            folder = root / role / name
            folder.mkdir(parents=True, exist_ok=True)
            shape = tuple(rng.integers(9, 40, 2))
            pixels = rng.integers(0, 90, (*shape, 3)).astype(np.uint8)
            pixels[:, : shape[1] // 2] += 100 if name == "left" else 0
            pixels[:, shape[1] // 2 :] += 100 if name == "right" else 0
            image = Image.fromarray(pixels)
            image = image.convert("L") if i % 10 == 9 else image
            image.save(folder / f"{i:03d}.jpg", quality=95)
    return root


def loaded(photos, workers=0, minival=0.1):
    return batches_lib.load(
        f"folder:{photos}", VIEWS, minival=minival, data_dir="", workers=workers
    )


ALONE = batches_lib.Share(0, 1, 1)


def training(split, share=ALONE, steps=30):
    return batches_lib.Training(split, 3, 16, False, steps, share)


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def feed_of(split, devices, drop_last=False):
    """Returns the feed of a run of 60 steps of 16 images, with seed 3."""
    stream, mesh = feeds.Stream(split, mesh_of(devices)), mesh_of(devices)
    sizes = {"batch_size": 16, "drop_last": drop_last, "steps": 60}
    return feeds.feed(feeds.of_run(stream, 3, mesh, print, **sizes))


def assert_alike(one, other):
    for field in ("images", "labels", "ids"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


# ------------------------------------------------------------------- crops


def test_a_random_box_has_the_requested_area_and_shape():
    rng, shares = np.random.default_rng(1), []
    for _ in range(400):
        left, top, right, bottom = crops.random_box(rng, 300, 200, (0.1, 0.5))
        w, h = right - left, bottom - top
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        assert 3 / 4 - 0.02 < w / h < 4 / 3 + 0.02
        shares.append(w * h / 60_000)
    assert 0.098 < min(shares) < 0.12 and 0.48 < max(shares) < 0.505
    assert 0.28 < np.mean(shares) < 0.32  # uniform in the area


def test_a_narrow_image_gets_the_largest_part_of_an_allowed_shape():
    box = crops.random_box(np.random.default_rng(0), 1000, 10, (1.0, 1.0))
    assert box == (493, 0, 506, 10)


def test_a_view_depends_on_seed_epoch_and_example_alone(photos):
    path = str(next((photos / "train" / "left").iterdir()))

    def view(*key):
        return crops.train_view(path, path, crops.generator(*key), 8, (0.3, 1.0))

    same = view(0, 1, 2)
    np.testing.assert_array_equal(view(0, 1, 2), same)
    for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert np.any(view(*key) != same)


def test_large_photos_are_decoded_small_and_look_the_same(tmp_path):
    """Decoding at a fraction of the size changes only the rounding."""
    y, x = np.mgrid[:600, :800]
    pixels = np.stack([x // 4, y // 3, (x + y) // 8], -1).astype(np.uint8)
    path = tmp_path / "large.jpg"
    Image.fromarray(pixels).save(path, quality=98)
    box = crops.random_box(crops.generator(0, 0, 0), 800, 600, (0.5, 1.0))
    fast = crops.train_view(str(path), "x", crops.generator(0, 0, 0), 32, (0.5, 1.0))
    slow = Image.open(path).resize((32, 32), Image.Resampling.BILINEAR, box)
    assert np.abs(fast.astype(int) - np.asarray(slow)).max() <= 6


def test_the_centre_is_cut_as_torchvision_cuts_it(tmp_path):
    """Resize(10) of 30x21 gives 14x10; CenterCrop(8) begins at 3 and 1."""
    pixels = np.random.default_rng(0).integers(0, 255, (21, 30, 3)).astype(np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    view = crops.test_view(str(path), "x", size=8, shorter=10)
    resized = Image.fromarray(pixels).resize((14, 10), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(view, np.asarray(resized)[1:9, 3:11])


# ------------------------------------------------------------------- batches


def test_a_batch_is_the_same_wherever_reading_starts(photos):
    """Promise 14: step k without the steps before it."""
    batches = training(loaded(photos).train)
    parts = itertools.islice(batches_lib.read(batches, 0, 0), 12)
    some = [part.split for part in parts]
    assert_alike(next(batches_lib.read(batches, 11, 0)).split, some[11])
    assert len({b.images.tobytes() for b in some}) == len(some)
    seen = np.sort(np.concatenate([b.ids for b in some[:6]]))  # 81 images, 6 batches
    np.testing.assert_array_equal(seen, loaded(photos).train.chosen)


@LONG
def test_processes_decode_what_threads_decode(photos):
    batches = training(loaded(photos).train)
    one, two = (batches_lib.read(batches, 4, workers) for workers in (0, 2))
    for _ in range(5):
        assert_alike(next(one).split, next(two).split)


@LONG
def test_no_process_is_left_behind(photos):
    feed = feed_of(loaded(photos, workers=2).train, 1, drop_last=True)
    before = set(multiprocessing.active_children())
    feed.begin(0)
    feed.next(np.zeros((1, 16), np.int32))
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    feed.close()
    for process in started:
        process.join(timeout=20)
        assert not process.is_alive()


def test_processes_share_a_batch_and_lose_nothing(photos):
    split = loaded(photos).train
    full = training(split)
    parts = [training(split, batches_lib.Share(i, 2, 4)) for i in (0, 1)]
    for step in (0, 5):  # the last one of an epoch has 1 example, which all decode
        shares = [part[step] for part in parts]
        assert {share.total for share in shares} == {full[step].total}
        found = [share.split for share in shares]
        if not full[step].total % 4:
            columns = zip(*map(dataclasses.astuple, found), strict=True)
            arrays = [(one.images, one.labels, one.ids) for one in found]
            columns = zip(*arrays, strict=True)
            found = [data.Split(*map(np.concatenate, columns))]
        for one in found:
            assert_alike(one, full[step].split)


def test_a_batch_that_devices_cannot_share_is_whole_everywhere(photos):
    """Six images for two processes of two devices each: all six for both."""
    share = batches_lib.Share(1, 2, 4)
    part = batches_lib.Training(loaded(photos).train, 3, 6, False, 9, share)[0]
    assert len(part.split) == part.total == 6
    mesh = mesh_of(4)
    keys = mesh_lib.replicate(device.keys(0), mesh)
    batch = feeds.Stream(loaded(photos).train, mesh).put(part, keys)
    assert batch.images.shape[0] == 6 and batch.images.is_fully_replicated


def test_a_short_batch_is_filled_up_after_its_examples(photos):
    split = loaded(photos).train
    short = training(split)[5]
    filled = dataclasses.replace(training(split), fills=True)[5]
    assert (short.total, filled.total) == (1, 16)
    for field in ("images", "labels", "ids"):
        ours, expected = (getattr(part.split, field) for part in (filled, short))
        np.testing.assert_array_equal(ours[:1], expected)
        assert len(ours) == 16
    assert set(filled.split.ids[1:]) == {split.chosen[0]}


def test_every_test_image_counts_exactly_once(photos):
    """Promise 27: on streamed input, 21 images in batches of 16."""
    stream, seen = feeds.Stream(loaded(photos).test, mesh_of(8)), []
    for held, rows, mask in feeds.testing(stream, 16):
        assert held.whole and len(held.labels) == len(rows) == 16
        seen += [int(i) for i in np.asarray(held.ids)[mask]]
    assert seen == list(range(21))


def test_held_out_images_are_never_trained_on(photos):
    found = loaded(photos, minival=0.2)
    assert len(found.train) == 72 and len(found.minival) == 18
    assert not set(found.train.chosen) & set(found.minival.chosen)
    assert found.fingerprint() != loaded(photos).fingerprint()


def test_an_image_that_cannot_be_read_is_named(photos, tmp_path):
    paths = list(records.from_folder(str(photos)).train.paths)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a JPEG")
    paths[7] = str(broken)
    files = records.Files(tuple(paths), np.zeros(len(paths), np.int32))
    split = dataclasses.replace(loaded(photos).train, source=files)
    with pytest.raises(errors.DataError, match="broken.jpg: not a readable image"):
        list(batches_lib.read(training(split, steps=6), 0, 0))


# ------------------------------------------------------------------- tfds


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_prepared_sets_are_read_without_tensorflow(form, tmp_path):
    other.prepare_own(tmp_path, other.parts(12, 5))
    if form == "tfrecord":
        cifar.as_tfrecords(tmp_path)
    views, data_dir = batches_lib.Views(6, (1.0, 1.0), 6), str(tmp_path)
    found = batches_lib.load("homemade", views, minival=0, data_dir=data_dir, workers=0)
    assert (len(found.train), len(found.test)) == (12, 5)
    assert isinstance(found.train.source.locations, np.ndarray) == (form == "tfrecord")
    split = found.train.take(np.arange(12))
    in_memory = data.load("homemade", data_dir=data_dir).train
    assert_alike(split, in_memory)


def test_half_a_tfrecord_is_refused_before_training(tmp_path):
    """Promise 32: where records are streamed."""
    other.prepare_own(tmp_path, other.parts(12, 5))
    cifar.as_tfrecords(tmp_path)
    (shard,) = tmp_path.rglob("homemade-train.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(errors.DataError, match="ends within a record"):
        records.from_tfds("homemade", str(tmp_path))


# ------------------------------------------------------------------- training


def streaming(photos):
    return {
        "data__source": f"folder:{photos}",
        "data__streaming": True,
        "data__image_size": 8,
        "data__test_resize": 10,
        "data__pad": 0,
        "data__crop_scale": (0.3, 1.0),
        "data__minival": 0.2,
        "data__drop_last": True,
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    yield from resume.lab_of(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def unbroken(lab, photos):
    """Returns the fields and folder of an uninterrupted run, cached."""

    @functools.cache
    def run(method, engine):
        fields = streaming(photos) | {"method": method, "local__engine": engine}
        fields["epochs"] = 2
        folder = lab.root / f"{method}-{engine}"
        lab.train(folder, **fields)
        return fields, folder

    return run


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        ("none", "fused"),
        pytest.param("lakd", "fused", marks=LONG),
        pytest.param("lakd", "dispatch", marks=LONG),
        pytest.param("lakd", "pipeline", marks=LONG),
    ],
)
def test_a_stopped_run_ends_as_the_unbroken_one(
    method, engine, unbroken, lab, tmp_path
):
    """Promise 12: to the last bit, with every engine."""
    fields, folder = unbroken(method, engine)
    with pytest.raises(interrupt.Interrupted):
        lab.train(tmp_path, tiny.StopAfter(4 + 2), **fields)
    assert resume.saved_steps(tmp_path)[-1] == 5  # of 8, the first of an epoch
    lab.train(tmp_path, **fields)
    resume.assert_equal_runs(resume.finished(folder), resume.finished(tmp_path))


def test_a_streamed_split_is_scored_as_one_in_memory(unbroken, lab):
    fields, folder = unbroken("none", "fused")
    settings = lab.config(**fields)
    result = json.loads((folder / workdir.RESULT).read_text())
    environment = resume.make_environment(settings, interrupt.Guard())
    held = device.device_data(environment.dataset.preview.test, 0, environment.mesh)
    network, _ = weights.student(folder / workdir.STUDENT, "float32")
    pixels = setup_lib.pixels(settings)
    score = single.evaluator(settings, network, pixels, environment)(
        network.variables, held
    )
    assert score.right == result["test_last"]["right"]
    assert score.examples == result["test_last"]["examples"] == 21
    assert result["image_shape"] == [8, 8, 3]
    assert result["data"] == environment.dataset.fingerprint()


def test_eight_devices_are_fed_like_one(photos):
    split = loaded(photos).train
    for devices in (1, 8):
        feed = feed_of(split, devices)
        feed.begin(4)
        for step in (4, 5):  # step 5 has one image, which no devices can share
            rows = np.zeros((1, 16 if step == 4 else 1), np.int32)
            assert_alike(feed.next(rows), training(split)[step].split)
        feed.close()


class Slow(batches_lib.Training):
    """Batches that are slow to decode."""

    def __getitem__(self, number):
        time.sleep(0.01)
        return super().__getitem__(number)


def test_a_stall_is_told(photos, monkeypatch):
    """Promise 33: once, with the required and the delivered rate."""
    monkeypatch.setattr(feeds, "MEASURED_STEPS", 10)
    split, mesh, lines = loaded(photos).train, mesh_of(1), []
    run = feeds.Run(
        feeds.Stream(split, mesh),
        Slow(split, 3, 16, True, 60, ALONE),
        mesh_lib.replicate(device.keys(0), mesh),
        lines.append,
    )
    feed = feeds.feed(run)
    feed.begin(0)
    for _ in range(45):
        feed.next(np.zeros((1, 16), np.int32))
    feed.close()
    (line,) = lines
    assert "waiting for images" in line and "delivered; raise data.workers" in line


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"data__pad": 4}, "set data.pad to 0, not 4"),
        ({"data__image_size": 0}, "set data.image_size"),
        ({"data__test_resize": 7}, "data.test_resize is 7, less than"),
        ({"data__max_bad": 1}, "data.max_bad is for data in memory"),
        ({"data__source": "digits"}, "set it to False for data.source=digits"),
        ({"data__crop_scale": (0.0, 1.0)}, "data.crop_scale must be"),
        ({"teacher__views": 2, "method": "kd"}, "teacher.views is for data in memory"),
    ],
)
def test_what_cannot_be_streamed_is_reported_first(fields, line, photos, tmp_path):
    settings = tiny.config(tmp_path, **(streaming(photos) | fields))
    found = check.problems(settings, 1)
    assert len(found) == 1 and line in found[0]


@LONG
def test_two_processes_stream_as_two_devices_of_one(photos, tmp_path):
    """Promise 27: each decodes its half of every batch, and every image counts once."""
    fields = streaming(photos) | distributed.PLAIN
    two = distributed.both(tmp_path / "two", fields)
    assert two[0][0] == 0
    with tiny.environment(devices=2):
        settings = tiny.small(tmp_path / "one", **fields)
        command.run(settings, tmp_path / "one" / "run", notify=lambda text: None)
    one, other = (distributed.finished(tmp_path / name) for name in ("one", "two"))
    assert one[1]["test_last"]["examples"] == other[1]["test_last"]["examples"] == 21
    assert one[1]["test_last"]["right"] == other[1]["test_last"]["right"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        one[0],
        other[0],
    )
