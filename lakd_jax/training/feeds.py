"""Supplies each step's images: from a split on the devices, or from prefetched batches.

The compiled step gathers its examples from a split that is resident on the devices. A
streamed split is passed to it one batch at a time, already gathered
(`DeviceData.whole`), and the next batch is read and transferred while a step runs.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lakd_jax.data import device
from lakd_jax.data.streaming import batches as batches_lib
from lakd_jax.runtime import mesh as mesh_lib

MEASURED_STEPS = 100  # steps over which the waiting time is measured
MAX_WAITING = 0.2  # share of waiting time above which a warning is issued


@dataclasses.dataclass(frozen=True)
class Stream:
    """A streamed split for the devices of `mesh`, used in place of `DeviceData`."""

    split: batches_lib.Streamed
    mesh: Mesh

    def put(
        self, part: batches_lib.Part, keys: dict[str, jax.Array]
    ) -> device.DeviceData:
        """Puts this process's part of a batch on the devices, and returns the batch.

        A batch that does not divide equally among the devices is replicated: every
        process then holds all of it, and so does every device.
        """
        sharding = mesh_lib.of_batch(self.mesh, part.total)

        def global_array(x: np.ndarray) -> jax.Array:
            shape = (part.total, *x.shape[1:])
            return jax.make_array_from_process_local_data(sharding, x, shape)

        local = part.split
        fields = (global_array(x) for x in (local.images, local.labels, local.ids))
        shape = local.shape
        return device.DeviceData(*fields, **keys, shape=shape, whole=True)

    def share(self) -> batches_lib.Share:
        """Returns which part of a batch this process decodes."""
        devices = self.mesh.size
        count = devices // max(len(self.mesh.local_devices), 1)
        index = jax.process_index() if count > 1 else 0
        return batches_lib.Share(index, count, devices)


@dataclasses.dataclass(frozen=True)
class Run:
    """The batches of a run on a streamed split, and the random keys of its seed."""

    source: Stream
    batches: batches_lib.Training
    keys: dict[str, jax.Array]
    notify: Callable[[str], None]


Data = device.DeviceData | Stream


def of_run(
    data: Data,
    seed: int,
    mesh: Mesh,
    notify: Callable[[str], None],
    *,
    batch_size: int,
    drop_last: bool,
    steps: int,
    fills: bool = False,
) -> device.DeviceData | Run:
    """Returns the training split as a run with this seed and `steps` reads it.

    With `fills`, streamed batches that are short are filled up to `batch_size`.
    """
    if isinstance(data, device.DeviceData):
        return device.rekeyed(data, seed, mesh)
    sizes = (batch_size, drop_last, steps)
    batches = batches_lib.Training(data.split, seed, *sizes, data.share(), fills)
    keys = mesh_lib.replicate(device.keys(seed), mesh)
    return Run(data, batches, keys, notify)


def feed(data: device.DeviceData | Run) -> "Feed":
    """Returns the feed for the data of a run."""
    return Prefetched(data) if isinstance(data, Run) else Feed(data)


class Feed:
    """Supplies engines with the data of each step: here, a split on the devices."""

    def __init__(self, data: device.DeviceData):
        self._data = data

    def begin(self, step: int) -> None:
        """Sets the number of the step whose data `next` returns first."""

    def next(self, rows: np.ndarray) -> device.DeviceData:
        """Returns data that holds the examples at `rows` (n, B) of the next step."""
        return self._data

    def close(self) -> None:
        """Stops prefetching and releases its workers."""


class Prefetched(Feed):
    """Feeds streamed batches, and always prefetches the next one to the devices."""

    def __init__(self, run: Run):
        self._run = run
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "lakd-feed")
        self._batches: Generator[Any, None, None] | None = None
        self._waited, self._since, self._steps, self._warned = 0.0, 0.0, 0, False

    def begin(self, step: int) -> None:
        """See `Feed`."""
        run = self._run
        workers = run.source.split.workers
        self._batches = batches_lib.read(run.batches, step, workers)
        self._pending = self._pool.submit(self._fetch)
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def next(self, rows: np.ndarray) -> device.DeviceData:
        """See `Feed`; `rows` has one row.

        Raises:
          DataError: an image cannot be read.
        """
        began = time.perf_counter()
        batch = self._pending.result()
        self._pending = self._pool.submit(self._fetch)
        if self._steps:  # the first batch also waits for the workers to start
            self._waited += time.perf_counter() - began
        self._measure_waiting(rows.size)
        assert batch is not None  # there are as many batches as steps
        return batch

    def close(self) -> None:
        """See `Feed`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._batches is not None:
            self._batches.close()  # ends the processes

    def _fetch(self) -> device.DeviceData | None:
        assert self._batches is not None  # `begin` comes first
        batch = next(self._batches, None)
        if batch is None:
            return None
        return self._run.source.put(batch, self._run.keys)

    def _measure_waiting(self, images: int) -> None:
        """Warns, at most once, if the devices spend too long waiting for images."""
        self._steps += 1
        if self._steps == 1:
            self._since = time.perf_counter()
        if self._steps <= MEASURED_STEPS:
            return
        spent, waited = time.perf_counter() - self._since, self._waited
        if waited > MAX_WAITING * spent and not self._warned:
            self._warned = True
            images_read = images * MEASURED_STEPS
            self._run.notify(
                f"waiting for images {100 * waited / spent:.0f} % of the time: "
                f"{images_read / (spent - waited):,.0f} images/s are needed, "
                f"{images_read / spent:,.0f} delivered; raise data.workers "
                f"({self._run.source.split.workers} now), or use more cores"
            )
        self._steps, self._waited = 0, 0.0


def testing(
    data: Data, batch_size: int
) -> Iterator[tuple[device.DeviceData, np.ndarray, np.ndarray]]:
    """Yields batches that cover a split exactly once, as (data, rows, mask).

    `rows` (B,) are positions in `data`. The last batch is padded with row 0,
    where `mask` (B,) is False.
    """
    examples = count(data)
    starts = range(0, examples, batch_size)
    if isinstance(data, device.DeviceData):
        batches: Iterator[device.DeviceData] = (data for _ in starts)
    else:
        plan = batches_lib.Testing(data.split, batch_size, data.share())
        keys = mesh_lib.replicate(device.keys(0), data.mesh)
        read = batches_lib.read(plan, 0, data.split.workers)
        batches = (data.put(batch, keys) for batch in read)
    for start, device_data in zip(starts, batches, strict=True):
        rows = np.arange(start, start + batch_size)
        mask = rows < examples
        yield device_data, np.where(mask, rows, 0), mask


def count(data: Data) -> int:
    """Returns the number of examples in a split."""
    if isinstance(data, device.DeviceData):
        return data.labels.shape[0]
    return len(data.split)


def first(data: Data, size: int) -> Data:
    """Returns the split cut to its first `size` examples."""
    if isinstance(data, device.DeviceData):
        images, labels = data.images[:size], data.labels[:size]
        return dataclasses.replace(data, images=images, labels=labels)
    few = dataclasses.replace(data.split, chosen=data.split.chosen[:size])
    return dataclasses.replace(data, split=few)
