"""Splits that do not fit into memory, with batches decoded on demand.

The examples of a step are `order.batch_indices`, as for splits in memory, and an
image's crop depends on (seed, epoch, example) alone. So the batch of any step can be
computed without those before it, which is how runs are resumed. Grain distributes the
batches over processes or threads and returns them in order.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterator
from typing import Any, Protocol

import numpy as np

from lakd_jax import errors
from lakd_jax.data import dataset, order
from lakd_jax.data.streaming import crops, records
from lakd_jax.data.streaming import workers as workers_lib

_PREFETCH = 2  # batches buffered per worker
PREVIEW = 2000  # images of each split that pictures and reports use


@dataclasses.dataclass(frozen=True)
class Views:
    """How encoded images are cropped.

    Attributes:
      size: height and width of the result.
      scale: smallest and largest share of the area in a random crop.
      shorter: length of the shorter side after resizing, before the centre crop.
      orient: whether photos are turned as their EXIF tag says.
    """

    size: int
    scale: tuple[float, ...]
    shorter: int
    orient: bool = True


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A split of encoded records; takes the place of `dataset.Split`.

    Attributes:
      source: all records of the source's split.
      chosen: (N,) int32, the ids of the records that belong to this split.
      views: how they are cropped.
      workers: number of decoding processes; 0 for threads of this process.
    """

    source: records.Records
    chosen: np.ndarray
    views: Views
    workers: int

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (H, W, 3) of an image."""
        return self.views.size, self.views.size, 3

    @property
    def labels(self) -> np.ndarray | None:
        """Labels (N,); None where they are part of records, read on demand."""
        if isinstance(self.source, records.Files):
            return self.source.labels[self.chosen]
        return None

    def name(self, row: int) -> str:
        """Returns the name of an example in messages and tables."""
        return self.source.name(int(self.chosen[row]))

    def take(self, rows: np.ndarray) -> dataset.Split:
        """Returns the test views of the examples at these positions, in memory."""
        return _split([_test_example(self, int(row)) for row in rows])

    def sample(self, count: int) -> dataset.Split:
        """Returns up to `count` examples, always the same; decodes in threads."""
        rows = np.sort(np.random.default_rng(0).permutation(len(self))[:count])
        chosen = dataclasses.replace(self, chosen=self.chosen[rows])
        parts = [part.split for part in read(Testing(chosen, 64, _ALL), 0, 0)]
        columns = zip(*((p.images, p.labels, p.ids) for p in parts), strict=True)
        return dataset.Split(*(np.concatenate(c)[: len(rows)] for c in columns))


def _split(examples: list[tuple[np.ndarray, int, int]]) -> dataset.Split:
    images, labels, ids = zip(*examples, strict=True)
    return dataset.Split(
        np.stack(images), np.array(labels, np.int32), np.array(ids, np.int32)
    )


def _test_example(split: Streamed, row: int) -> tuple[np.ndarray, int, int]:
    """Returns (test view, label, id) of the example at `row`."""
    example, views = int(split.chosen[row]), split.views
    source, label = split.source.read(example)
    name = split.source.name(example)
    view = crops.test_view(source, name, views.size, views.shorter, views.orient)
    return view, label, example


def _train_example(
    split: Streamed, row: int, seed: int, epoch: int
) -> tuple[np.ndarray, int, int]:
    """Returns (random view, label, id) of the example at `row`."""
    example, views = int(split.chosen[row]), split.views
    source, label = split.source.read(example)
    rng = crops.generator(seed, epoch, example)
    name = split.source.name(example)
    view = crops.train_view(source, name, rng, views.size, views.scale, views.orient)
    return view, label, example


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every batch that this process decodes: number `index` of `count`.

    Every process decodes all of a batch that cannot be split equally over `devices`.
    """

    index: int
    count: int
    devices: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Selects the positions of this process."""
        if len(rows) % self.devices:
            return rows
        part = len(rows) // self.count
        return rows[self.index * part : (self.index + 1) * part]


_ALL = Share(index=0, count=1, devices=1)


@dataclasses.dataclass(frozen=True)
class Part:
    """This process's share of a batch.

    Attributes:
      split: its examples.
      total: number of examples in the full batch.
    """

    split: dataset.Split
    total: int


class Batches(Protocol):
    """Batches by number; pickled for the processes that decode them."""

    def __len__(self) -> int:
        """Returns the number of batches."""
        ...

    def __getitem__(self, number: int) -> Any:
        """Decodes one batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """The batches of a run by step, in the order of `order.batch_indices`.

    With `fills`, a short last batch is filled up with the first example.
    """

    split: Streamed
    seed: int
    batch_size: int
    drop_last: bool
    steps: int
    share: Share
    fills: bool = False

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> Part:
        """Decodes this process's part of the batch of a step."""
        count = len(self.split)
        sizes = (count, self.batch_size, self.drop_last)
        rows = order.batch_indices(self.seed, number, *sizes)
        if self.fills:
            rows = np.maximum(order.filled(rows, self.batch_size), 0)
        epoch = number // order.steps_per_epoch(*sizes)
        examples = [
            _train_example(self.split, int(row), self.seed, epoch)
            for row in self.share(rows)
        ]
        return Part(_split(examples), len(rows))


@dataclasses.dataclass(frozen=True)
class Testing:
    """All examples in order; the last batch is padded with the first example."""

    split: Streamed
    batch_size: int
    share: Share

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, number: int) -> Part:
        """Decodes this process's part of a batch."""
        rows = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        rows = np.where(rows < len(self.split), rows, 0)
        return Part(self.split.take(self.share(rows)), len(rows))


def read(batches: Batches, start: int, workers: int) -> Generator[Any, None, None]:
    """Yields the batches from number `start` on, in order, decoded ahead of time.

    Args:
      batches: the batches to decode.
      start: number of the first.
      workers: processes that decode one batch each; 0 for threads of this process.

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
        except Exception as error:  # from another process: only its text is available
            text = " ".join(str(error).split())[-600:]
            if "terminated unexpectedly" in text:
                text += (
                    f"\nIf the lines above show no other cause, {workers_lib.REMEDY}"
                )
            raise errors.DataError(f"reading images failed: {text}") from error
        yield batch


def _grain(batches: Batches, start: int, workers: int) -> Iterator[Any]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain passes absl's flags to its processes
        flags.FLAGS.mark_as_parsed()
    source: Any = batches
    data = grain.MapDataset.source(source)[start:]
    if workers:
        read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
        options = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=_PREFETCH
        )
        return iter(data.to_iter_dataset(read_options).mp_prefetch(options))
    read_options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * _PREFETCH)
    return iter(data.to_iter_dataset(read_options))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The counterpart of `dataset.Dataset` with streamed splits."""

    name: str
    classes: tuple[str, ...]
    train: Streamed
    minival: Streamed | None
    test: Streamed

    @functools.cached_property
    def preview(self) -> dataset.Dataset:
        """Test views of some images, in memory, for pictures and reports."""
        minival = self.minival.sample(PREVIEW) if self.minival else None
        train, test = self.train.sample(PREVIEW), self.test.sample(PREVIEW)
        return dataset.Dataset(self.name, self.classes, train, minival, test)

    def fingerprint(self) -> str:
        """Returns a hash of the files' names and sizes, the splits and class names."""
        sources = [self.train.source, self.test.source]
        if self.minival and self.minival.source is not self.train.source:
            sources.append(self.minival.source)
        facts = [self.classes, len(self.train), *(s.fingerprint() for s in sources)]
        return records.digest(repr(facts))


def load(
    source: str,
    views: Views,
    *,
    minival: float,
    data_dir: str,
    workers: int,
    test_share: float = 0.0,
) -> Dataset:
    """Lists the examples of a data set without decoding any.

    Args:
      source: "folder:PATH" or a tfds name, as for `sources.load`.
      views: how images are cropped.
      minival: fraction of the training split held out, the same in every run; not
        stratified, since labels are known only when records are read. Not used if the
        source has a minival of its own.
      data_dir: the data directory of tfds.
      workers: number of decoding processes; 0 for threads.
      test_share: share of the images that is tested on, if the source has no test
        split; stratified in folders only.

    Raises:
      DataError: the data is missing, invalid or incomplete.
    """
    if workers:
        workers_lib.require_guard()
    if source.startswith("folder:"):
        found = records.from_folder(source.removeprefix("folder:"), test_share)
    elif source == "digits":
        raise errors.DataError(
            "data.source=digits is always in memory: set data.streaming=False"
        )
    else:
        found = records.from_tfds(source, data_dir, test_share)

    def split(split_records: records.Records, chosen: np.ndarray) -> Streamed:
        return Streamed(split_records, chosen.astype(np.int32), views, workers)

    def complete(split_records: records.Records) -> Streamed:
        return split(split_records, np.arange(len(split_records)))

    # Sorts raw Philox words, as `dataset.stratified_mask` does: stable across versions.
    words = np.random.Philox(key=0).random_raw(len(found.train))
    chosen = np.argsort(words, kind="stable")
    if found.test is None:
        count = _count(test_share, chosen, "data.test_share")
        test, chosen = split(found.train, np.sort(chosen[:count])), chosen[count:]
    else:
        test = complete(found.test)
    held_out = complete(found.minival) if found.minival else None
    if minival and held_out is None:
        count = round(minival * len(chosen))
        if count:
            held_out = split(found.train, np.sort(chosen[:count]))
        chosen = chosen[count:]
    train = split(found.train, np.sort(chosen))
    return Dataset(source, found.classes, train, held_out, test)


def _count(share: float, rows: np.ndarray, field: str) -> int:
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise errors.DataError(
            f"{field}={share:g} takes {count} of {len(rows)} images: give another."
        )
    return count
