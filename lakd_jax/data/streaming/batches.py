"""Splits that do not fit into memory: batches decoded as they are needed.

Which examples a step sees is `order.batch_indices`, as for splits in memory, and how an
image is cut depends on (seed, epoch, example) alone; so any step's batch can be asked
for first, and a resumed run asks for the next. Grain spreads the work over processes
or threads, a batch each, and hands batches over in order.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterator
from typing import Any, Protocol

import numpy as np

from lakd_jax import errors
from lakd_jax.data import dataset, order
from lakd_jax.data.streaming import crops, records

_AHEAD = 2  # batches that wait for each worker
PREVIEW = 2000  # images of each split that are looked at in pictures and reports


@dataclasses.dataclass(frozen=True)
class Views:
    """How an encoded image becomes an array.

    Attributes:
      size: side of it.
      scale: least and largest share of the area of a random crop.
      shorter: what the shorter side becomes before the centre is cut out.
    """

    size: int
    scale: tuple[float, float]
    shorter: int


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A split as encoded records; stands where `dataset.Split` does.

    Attributes:
      source: the records of the whole split of the source.
      chosen: (N,) int32, which of them belong to this split: their ids.
      views: how they are cut.
      workers: processes that decode; 0 for threads in this one.
    """

    source: records.Records
    chosen: np.ndarray
    views: Views
    workers: int

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self.views.size, self.views.size, 3

    def take(self, rows: np.ndarray) -> dataset.Split:
        """The examples at these positions as they are tested, in memory."""
        return _split([_test(self, int(row)) for row in rows])

    def sample(self, count: int) -> dataset.Split:
        """Up to `count` examples, the same every time; decoded in threads."""
        rows = np.sort(np.random.default_rng(0).permutation(len(self))[:count])
        parts = [rows[at : at + 64] for at in range(0, len(rows), 64)]
        batches = list(_grain(_Listed(self, parts), 0, 0))
        return _split([one for batch in batches for one in batch])


def _split(examples: list[tuple[np.ndarray, int, int]]) -> dataset.Split:
    images, labels, ids = zip(*examples, strict=True)
    return dataset.Split(
        np.stack(images), np.array(labels, np.int32), np.array(ids, np.int32)
    )


def _test(split: Streamed, row: int) -> tuple[np.ndarray, int, int]:
    """(image as it is tested, label, id) of the example at `row`."""
    example, views = int(split.chosen[row]), split.views
    source, label = split.source.read(example)
    name = split.source.name(example)
    return crops.test_view(source, name, views.size, views.shorter), label, example


def _train(
    split: Streamed, row: int, seed: int, epoch: int
) -> tuple[np.ndarray, int, int]:
    """(random view, label, id) of the example at `row`."""
    example, views = int(split.chosen[row]), split.views
    source, label = split.source.read(example)
    rng = crops.generator(seed, epoch, example)
    name = split.source.name(example)
    view = crops.train_view(source, name, rng, views.size, views.scale)
    return view, label, example


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of every batch this process decodes: number `index` of `count`.

    A batch that all `devices` cannot share equally is decoded whole by every process.
    """

    index: int
    count: int
    devices: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The positions that are this process's."""
        if len(rows) % self.devices:
            return rows
        part = len(rows) // self.count
        return rows[self.index * part : (self.index + 1) * part]


@dataclasses.dataclass(frozen=True)
class Part:
    """This process's share of a batch.

    Attributes:
      split: its examples.
      total: how many the whole batch has.
    """

    split: dataset.Split
    total: int


class Batches(Protocol):
    """Batches by number; travels to the processes that decode them."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, number: int) -> Any:
        """One of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """The batches of a run by step, as `order.batch_indices` has them."""

    split: Streamed
    seed: int
    batch_size: int
    drop_last: bool
    steps: int
    share: Share

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> Part:
        """Of the batch of a step."""
        count = len(self.split)
        sizes = (count, self.batch_size, self.drop_last)
        rows = order.batch_indices(self.seed, number, *sizes)
        epoch = number // order.steps_per_epoch(*sizes)
        own = [_train(self.split, int(r), self.seed, epoch) for r in self.share(rows)]
        return Part(_split(own), len(rows))


@dataclasses.dataclass(frozen=True)
class Testing:
    """All examples in order; the last batch is filled up with the first example."""

    split: Streamed
    batch_size: int
    share: Share

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, number: int) -> Part:
        """Of a batch."""
        rows = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        rows = np.where(rows < len(self.split), rows, 0)
        return Part(self.split.take(self.share(rows)), len(rows))


@dataclasses.dataclass(frozen=True)
class _Listed:
    """Batches of given rows, as they are tested."""

    split: Streamed
    rows: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> list[tuple[np.ndarray, int, int]]:
        return [_test(self.split, int(row)) for row in self.rows[number]]


def read(batches: Batches, start: int, workers: int) -> Generator[Any, None, None]:
    """The batches from number `start` on, decoded ahead of time, in order.

    Args:
      batches: what is decoded.
      start: the first that is wanted.
      workers: processes that decode a batch each; 0 for threads in this one.

    Raises:
      DataError: an example cannot be read or decoded.
    """
    iterator = _grain(batches, start, workers)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except errors.LakdError:
            raise
        except Exception as error:  # from another process: only its text is kept
            text = " ".join(str(error).split())
            raise errors.DataError(f"reading images failed: {text[-600:]}") from error
        yield batch


def _grain(batches: Batches, start: int, workers: int) -> Iterator[Any]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain's processes are handed absl's flags
        flags.FLAGS.mark_as_parsed()
    source: Any = batches
    data = grain.MapDataset.source(source)[start:]
    if workers:
        one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        options = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=_AHEAD
        )
        return iter(data.to_iter_dataset(one).mp_prefetch(options))
    several = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * _AHEAD)
    return iter(data.to_iter_dataset(several))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What `dataset.Dataset` is, of splits that are streamed."""

    name: str
    classes: tuple[str, ...]
    train: Streamed
    minival: Streamed | None
    test: Streamed

    @functools.cached_property
    def preview(self) -> dataset.Dataset:
        """Some images in memory, as they are tested: for pictures and reports."""
        minival = self.minival.sample(PREVIEW) if self.minival else None
        train, test = self.train.sample(PREVIEW), self.test.sample(PREVIEW)
        return dataset.Dataset(self.name, self.classes, train, minival, test)

    def fingerprint(self) -> str:
        """Of the files' names and sizes, the splits and the class names."""
        sources = (self.train.source, self.test.source)
        told = repr(
            [self.classes, len(self.train), *(s.fingerprint() for s in sources)]
        )
        return records.digest(told)


def load(
    source: str,
    views: Views,
    *,
    minival: float,
    data_dir: str,
    workers: int,
) -> Dataset:
    """Finds the examples of a set; decodes none.

    Args:
      source: "folder:PATH" or a tfds name, as for `sources.load`.
      views: how images are cut.
      minival: fraction of the training split held out, the same in every run; not
        stratified, since labels are known only when records are read.
      data_dir: where tfds keeps its sets.
      workers: processes that decode; 0 for threads.

    Raises:
      DataError: the data is missing, unfit or incomplete.
    """
    if source.startswith("folder:"):
        found = records.from_folder(source.removeprefix("folder:"))
    elif source == "digits":
        raise errors.DataError(
            "data.source=digits is in memory: set data.streaming=False"
        )
    else:
        found = records.from_tfds(source, data_dir)
    classes, train, test = found

    def split(of: records.Records, chosen: np.ndarray) -> Streamed:
        return Streamed(of, chosen.astype(np.int32), views, workers)

    # Sorted raw Philox words, as in `dataset.stratified_mask`: the same for ever.
    words = np.random.Philox(key=0).random_raw(len(train))
    shuffled = np.argsort(words, kind="stable")
    count = round(minival * len(train))
    kept, held = np.sort(shuffled[count:]), np.sort(shuffled[:count])
    return Dataset(
        source,
        classes,
        split(train, kept),
        split(train, held) if count else None,
        split(test, np.arange(len(test))),
    )
