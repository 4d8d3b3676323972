"""Records of how runs ended: one file per run of a table, one file per named plan."""

import contextlib
import fcntl
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plan
from lakd_jax import errors
from lakd_jax.store import workdir

Record = dict[str, Any]

_KEPT = ("versions", "commit", "devices", "platform")  # of the environment


class Folder:
    """The records of a table: one JSON file per run, failures included."""

    def __init__(self, folder: Path):
        self._folder = folder

    def path(self, job: plan.Job) -> Path:
        """Returns the file of a run."""
        return self._folder / f"{job.name}.json"

    def read(self, jobs: Iterable[plan.Job]) -> dict[str, Record]:
        """Returns the records of `jobs` that exist, by the jobs' names.

        Raises:
          errors.WorkdirError: a record is of another command, e.g. of other epochs.
        """
        found: dict[str, Record] = {}
        for job in jobs:
            file = self.path(job)
            if file.exists():
                found[job.name] = record = workdir.read_json(file)
                _require_same(file, record["settings"], job.settings, "--out")
        return found

    def add(self, job: plan.Job, ended: Record) -> Record:
        """Keeps how a run ended and returns its record.

        Args:
          ended: {"error": text}, or {"result": as in result.json, "memory": peaks}.
        """
        known: Record = {}
        environment = job.directory / workdir.ENVIRONMENT
        if environment.exists():
            fields = workdir.read_json(environment)
            known = {name: fields[name] for name in _KEPT}
        record = {
            "pair": list(job.pair),
            "method": job.method,
            "seed": job.seed,
            "settings": list(job.settings),
            "command": text(job.argv),
            **known,
            **ended,
        }
        file = self.path(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(file, record)
        return record

    def forget_failures(self, jobs: Iterable[plan.Job]) -> None:
        """Removes the records of runs that failed, so that they are made again."""
        by_name = {job.name: job for job in jobs}
        for name, record in self.read(by_name.values()).items():
            if "error" in record:
                self.path(by_name[name]).unlink(missing_ok=True)


class File:
    """The records of a named plan: all finished runs in one JSON file.

    Failures are not kept, so the same command makes these runs again. Several
    processes may add records.
    """

    def __init__(self, path: Path, extra: Callable[[Path], Record] | None = None):
        """See the class.

        Args:
          extra: computes further entries of a record from the run's directory.
        """
        self._path, self._extra = path, extra

    def _all(self) -> dict[str, Record]:
        return workdir.read_json(self._path) if self._path.exists() else {}

    def read(self, jobs: Iterable[plan.Job]) -> dict[str, Record]:
        """See `Folder`."""
        kept, found = self._all(), {}
        for job in jobs:
            if job.name in kept:
                found[job.name] = record = kept[job.name]
                settings = shlex.split(record["command"])[2:]  # after python main.py
                _require_same(self._path, settings, job.settings, "--record")
        return found

    def add(self, job: plan.Job, ended: Record) -> Record:
        """See `Folder`."""
        if "error" in ended:
            return ended
        environment = workdir.read_json(job.directory / workdir.ENVIRONMENT)
        record = {
            "command": text(job.settings),
            "result": ended["result"],
            "versions": environment["versions"],
            **(self._extra(job.directory) if self._extra else {}),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(self._path.with_name(f".{self._path.name}.lock"), fcntl.LOCK_EX):
            # Read under the lock: another process may have added a run meanwhile.
            workdir.write_json(self._path, self._all() | {job.name: record})
        return record

    def forget_failures(self, jobs: Iterable[plan.Job]) -> None:
        """See `Folder`; there are none."""


def text(arguments: Sequence[str]) -> str:
    """Returns a command of main.py as it is typed."""
    return f"python main.py {shlex.join(arguments)}"


def _require_same(
    file: Path, recorded: Sequence[str], wanted: Sequence[str], flag: str
) -> None:
    if list(recorded) != list(wanted):
        others = " ".join(sorted(set(recorded) ^ set(wanted)))
        raise errors.WorkdirError(
            f"{file}: is of another command, which differs in {others or 'the order'}"
            f"\nUse another {flag}."
        )


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Claims a run for this process; yields False if another process has it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_name(f".{directory.name}.lock")
    with contextlib.ExitStack() as stack:
        is_free = True
        try:
            stack.enter_context(_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            is_free = False
        yield is_free


@contextlib.contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, how)
        yield


def seconds(result: Mapping[str, Any]) -> float:
    """Returns the time of a run, both stages of an HME."""
    return result["seconds"] + result.get("stage1", {"seconds": 0.0})["seconds"]


def estimate(
    waiting: Sequence[plan.Job], jobs: Sequence[plan.Job], kept: Mapping[str, Record]
) -> tuple[float, int]:
    """Returns the seconds that `waiting` will take, and how many have no estimate.

    A run takes as long as others that differ by their seed alone, else as long as
    others of the same pair.
    """
    by_label: dict[str, list[float]] = {}
    by_pair: dict[object, list[float]] = {}
    for job in jobs:
        if "result" in kept.get(job.name, {}):
            took = seconds(kept[job.name]["result"])
            by_label.setdefault(job.label, []).append(took)
            by_pair.setdefault(job.pair, []).append(took)
    known = [by_label.get(job.label) or by_pair.get(job.pair) for job in waiting]
    total = sum(statistics.fmean(took) for took in known if took)
    return total, sum(took is None for took in known)
