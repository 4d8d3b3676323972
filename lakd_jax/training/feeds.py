"""Where a step's images come from: a split on the devices, or batches read ahead.

A split on the devices is gathered from by the compiled step. A streamed one is given
to it batch by batch, each already cut (`DeviceData.whole`), and the next one is read
and sent while a step runs.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lakd_jax.data import device
from lakd_jax.data.streaming import batches as batches_lib
from lakd_jax.runtime import mesh as mesh_lib

WATCHED = 100  # steps over which waiting is measured
PATIENCE = 0.2  # share of the time that may be spent waiting


@dataclasses.dataclass(frozen=True)
class Stream:
    """A streamed split on the devices of `mesh`; stands where `DeviceData` does."""

    split: batches_lib.Streamed
    mesh: Mesh

    def put(
        self, part: batches_lib.Part, keys: dict[str, jax.Array]
    ) -> device.DeviceData:
        """The batch that this process has a part of, spread over all devices.

        One that they cannot share equally is whole in each part, and on each device.
        """
        spread = part.total % self.mesh.size == 0
        spec = PartitionSpec("data") if spread else PartitionSpec()
        sharding = NamedSharding(self.mesh, spec)

        def array(x: np.ndarray) -> jax.Array:
            shape = (part.total, *x.shape[1:])
            return jax.make_array_from_process_local_data(sharding, x, shape)

        own = part.split
        fields = (array(x) for x in (own.images, own.labels, own.ids))
        return device.DeviceData(*fields, **keys, whole=True)

    def share(self) -> batches_lib.Share:
        """The part of a batch that this process decodes."""
        devices = self.mesh.size
        count = devices // max(len(self.mesh.local_devices), 1)
        index = jax.process_index() if count > 1 else 0
        return batches_lib.Share(index, count, devices)


@dataclasses.dataclass(frozen=True)
class Run:
    """The batches of a run on a streamed split, with the keys of its seed."""

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
) -> device.DeviceData | Run:
    """The training split as the run of a seed, with so many steps, reads it."""
    if isinstance(data, device.DeviceData):
        return device.rekeyed(data, seed, mesh)
    sizes = (batch_size, drop_last, steps)
    batches = batches_lib.Training(data.split, seed, *sizes, data.share())
    keys = mesh_lib.replicate(device.keys(seed), mesh)
    return Run(data, batches, keys, notify)


class Feed(Protocol):
    """What engines ask for a step's data."""

    def begin(self, step: int) -> None:
        """The next step is the one with this number."""
        ...

    def next(self, rows: np.ndarray) -> device.DeviceData:
        """What holds the examples at `rows` (n, B) of the step that is next."""
        ...

    def close(self) -> None:
        """Lets go of what reads ahead."""
        ...


def feed(data: device.DeviceData | Run) -> Feed:
    """Of the data of a run."""
    return Ahead(data) if isinstance(data, Run) else Held(data)


class Held:
    """A split that is on the devices already."""

    def __init__(self, data: device.DeviceData):
        self._data = data

    def begin(self, step: int) -> None:
        """See `Feed`."""

    def next(self, rows: np.ndarray) -> device.DeviceData:
        """See `Feed`."""
        return self._data

    def close(self) -> None:
        """See `Feed`."""


class Ahead:
    """Streamed batches, one of which is always on its way to the devices."""

    def __init__(self, run: Run):
        self._run = run
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "lakd-feed")
        self._batches: Generator[Any, None, None] | None = None
        self._waited, self._since, self._seen, self._told = 0.0, 0.0, 0, False

    def begin(self, step: int) -> None:
        """See `Feed`."""
        run = self._run
        workers = run.source.split.workers
        self._batches = batches_lib.read(run.batches, step, workers)
        self._coming = self._pool.submit(self._fetch)
        self._since, self._seen, self._waited = time.perf_counter(), 0, 0.0

    def next(self, rows: np.ndarray) -> device.DeviceData:
        """See `Feed`; one row.

        Raises:
          DataError: an image cannot be read.
        """
        began = time.perf_counter()
        batch = self._coming.result()
        self._coming = self._pool.submit(self._fetch)
        if self._seen:  # the first one starts the workers
            self._waited += time.perf_counter() - began
        self._watch(rows.size)
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

    def _watch(self, images: int) -> None:
        """Says once if the devices wait for images."""
        self._seen += 1
        if self._seen == 1:
            self._since = time.perf_counter()
        if self._seen <= WATCHED:
            return
        spent, waited = time.perf_counter() - self._since, self._waited
        if waited > PATIENCE * spent and not self._told:
            self._told = True
            self._run.notify(
                f"waiting for images {100 * waited / spent:.0f} % of the time: "
                f"{images * WATCHED / (spent - waited):,.0f} images/s are needed, "
                f"{images * WATCHED / spent:,.0f} delivered; raise data.workers "
                f"({self._run.source.split.workers} now), or use more cores"
            )
        self._seen, self._waited = 0, 0.0


def testing(
    data: Data, batch_size: int
) -> Iterator[tuple[device.DeviceData, np.ndarray, np.ndarray]]:
    """All examples of a split, once each: (what holds them, rows, mask), (B,) both.

    The last batch is filled up with the first example, where the mask is False.
    """
    examples = count(data)
    starts = range(0, examples, batch_size)
    if isinstance(data, device.DeviceData):
        held: Iterator[device.DeviceData] = (data for _ in starts)
    else:
        batches = batches_lib.Testing(data.split, batch_size, data.share())
        keys = mesh_lib.replicate(device.keys(0), data.mesh)
        read = batches_lib.read(batches, 0, data.split.workers)
        held = (data.put(batch, keys) for batch in read)
    for start, device_data in zip(starts, held, strict=True):
        rows = np.arange(start, start + batch_size)
        mask = rows < examples
        yield device_data, np.where(mask, rows, 0), mask


def count(data: Data) -> int:
    """How many examples a split has."""
    if isinstance(data, device.DeviceData):
        return data.labels.shape[0]
    return len(data.split)


def first(data: Data, size: int) -> Data:
    """The split with no more than its first `size` examples."""
    if isinstance(data, device.DeviceData):
        images, labels = data.images[:size], data.labels[:size]
        return dataclasses.replace(data, images=images, labels=labels)
    few = dataclasses.replace(data.split, chosen=data.split.chosen[:size])
    return dataclasses.replace(data, split=few)
