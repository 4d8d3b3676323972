"""Measures images per second of several ways of reading JPEGs on this machine.

    python -m benchmarks.input --images=DIR --records=2400

DIR holds JPEGs, at any depth; they are repeated until there are --records of them.
Each way crops random parts and resizes them to 224. Ours is compared with a loader as
torchvision's users write it (decode the whole image, then crop) and, if TensorFlow is
installed, with plain tf.data and its fused decode and crop. The ways are measured in
turn, `--rounds` times, each from its first result on; the median is reported.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import flag_types
from lakd_jax.data.streaming import batches as batches_lib
from lakd_jax.data.streaming import crops, records
from lakd_jax.store import workdir

SIZE, SCALE, BATCH = 224, (0.08, 1.0), 64
RESULTS = Path(__file__).parent / "results" / "input.json"

# Yields the number of images of each piece of work when it is done.
Way = Callable[[Sequence[str]], Iterator[int]]


def ours(workers: int) -> Way:
    """Reads as the trainer does: Grain with threads (0) or processes."""

    def way(paths: Sequence[str]) -> Iterator[int]:
        files = records.Files(tuple(paths), np.zeros(len(paths), np.int32))
        views = batches_lib.Views(SIZE, SCALE, 256)
        split = batches_lib.Streamed(files, np.arange(len(paths)), views, workers)
        steps = len(paths) // BATCH
        batches = batches_lib.Training(
            split, 0, BATCH, True, steps, batches_lib.Share(0, 1, 1)
        )
        yield from (part.total for part in batches_lib.read(batches, 0, workers))

    return way


def one_by_one(paths: Sequence[str]) -> Iterator[int]:
    """Decodes as we do, in this thread, with nothing around it."""
    for i, path in enumerate(paths):
        crops.train_view(path, path, crops.generator(0, 0, i), SIZE, SCALE)
        yield 1


def _whole_then_cut(job: tuple[int, str]) -> np.ndarray:
    i, path = job
    rng = crops.generator(0, 0, i)
    with Image.open(path) as file:
        image = file.convert("RGB")
    box = crops.random_box(rng, *image.size, SCALE)
    cut = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(cut)


def whole_then_cut(paths: Sequence[str]) -> Iterator[int]:
    """Decodes and crops as torchvision does, in this thread."""
    yield from (1 for _ in map(_whole_then_cut, enumerate(paths)))


def whole_then_cut_processes(paths: Sequence[str]) -> Iterator[int]:
    """Decodes and crops as torchvision does, in two processes that send arrays."""
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        jobs = enumerate(paths)
        yield from (1 for _ in pool.map(_whole_then_cut, jobs, chunksize=BATCH))


def tf_data(antialias: bool) -> Way:
    """Reads with tf.data and its fused decode and crop, stateless per example.

    Pillow's bilinear filter averages where it shrinks; TensorFlow's takes four pixels,
    unless `antialias` is set.
    """
    return functools.partial(_tf_data, antialias)


def _tf_data(antialias: bool, paths: Sequence[str]) -> Iterator[int]:
    import tensorflow as tf

    def cut(number, path):
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros((1, 0, 4)),
            seed=tf.stack([0, number]),
            area_range=SCALE,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        return tf.cast(
            tf.image.resize(image, (SIZE, SIZE), antialias=antialias), tf.uint8
        )

    numbers = tf.range(len(paths))
    data = tf.data.Dataset.from_tensor_slices((numbers, list(paths)))
    data = data.map(cut, tf.data.AUTOTUNE, deterministic=True).batch(BATCH).prefetch(2)
    yield from map(len, data.as_numpy_iterator())


WAYS: dict[str, Way] = {
    "ours, one thread": one_by_one,
    "ours, Grain, threads": ours(0),
    "ours, Grain, 2 processes": ours(2),
    "decode whole, then cut, one thread": whole_then_cut,
    "decode whole, then cut, 2 processes": whole_then_cut_processes,
    "tf.data, fused decode and cut": tf_data(antialias=False),
    "the same, antialiased": tf_data(antialias=True),
}


def measure(paths: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Returns images per second of every way that can run, by round."""
    ways = dict(WAYS)
    if importlib.util.find_spec("tensorflow") is None:
        ways = {n: w for n, w in ways.items() if getattr(w, "func", w) is not _tf_data}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            counts = way(paths)
            next(counts)  # starts processes and compiles
            began = time.perf_counter()
            count = sum(counts)
            speeds[name].append(count / (time.perf_counter() - began))
            print(f"{name}: {speeds[name][-1]:,.0f} images/s", flush=True)
    return speeds


def repeated(folder: Path, count: int) -> Iterator[str]:
    """Yields paths of the JPEGs below a folder, repeated to `count`."""
    kinds = (".jpg", ".jpeg")
    found = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in kinds)
    if not found:
        raise SystemExit(f"--images: {folder} holds no JPEGs")
    return itertools.islice(itertools.cycle(found), count)


def main() -> None:
    """Measures, prints a table and writes a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, type=flag_types.path)
    parser.add_argument("--records", default=2400, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    chosen = parser.parse_args()
    paths = list(repeated(chosen.images, chosen.records))
    speeds = measure(paths, chosen.rounds)
    kept = {
        "command": f"python -m benchmarks.input --images=DIR --records={len(paths)}",
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "images_per_second": speeds,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    workdir.write_json(RESULTS, kept)
    print("| way | images/s |\n| :--- | ---: |")
    for name, values in speeds.items():
        print(f"| {name} | {statistics.median(values):,.0f} |")


if __name__ == "__main__":
    main()
