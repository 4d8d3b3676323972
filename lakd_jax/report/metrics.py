"""Reads and writes the metrics of a run: metrics.jsonl, and trackers such as wandb."""

import math
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, Self

from lakd_jax import errors, paths
from lakd_jax import trackers as trackers_lib
from lakd_jax.trackers import json_lines, tracker

FILENAME = json_lines.FILENAME


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a run, oldest first; [] if there are none.

    Values that were not finite are returned as NaN. A line cut short by a crash is
    skipped.
    """
    try:
        lines = (paths.of(workdir) / FILENAME).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = [json_lines.parse(line) for line in lines]
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in records
        if record is not None
    ]


class MetricWriter:
    """Writes metrics.jsonl into a run directory, and hands the records to trackers.

    A context manager; with several processes, only the first one writes. Write the
    records of a step before its checkpoint: on resume, all records after
    `resume_step` are dropped and written again, so the file ends up identical to
    that of an uninterrupted run. In a bucket, files appear when `save` is called, and
    at the end.

    What fails does not stop training: the first error of metrics.jsonl or of a tracker,
    such as a full disk or a lost network, is reported, and nothing more is written to
    it; the others go on.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None,
        warn: Callable[[str], None] | None = None,
        trackers: Iterable[str] = trackers_lib.DEFAULT,
        about: tracker.About | None = None,
    ):
        """Prepares a writer; files are opened on entering the context.

        Args:
          workdir: run directory, created if missing.
          resume_step: step of the restored checkpoint; None starts from scratch and
            drops all earlier records.
          warn: receives a warning line per failure; None prints it to stderr.
          trackers: names, see `lakd_jax.trackers`.
          about: what trackers are told of the run.
        """
        self._workdir = paths.of(workdir)
        self._resume_step = resume_step
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        self._about = about or tracker.About()
        self._lines = json_lines.JsonLines()
        self._names = list(dict.fromkeys(trackers))
        self._writing: dict[str, tracker.Tracker] = {}  # by name, "" is metrics.jsonl
        self._mirror: Any = None  # in the first process
        self._warned = False

    def __enter__(self) -> Self:
        from lakd_jax.runtime import hosts
        from lakd_jax.store import mirror

        if hosts.is_first():
            kept = [tracker.file_of(name) for name in self._names]
            self._mirror = mirror.Mirror(self._workdir, [FILENAME, *kept])
            self._writing[""] = self._lines
            self._try("", self._open)
            for name in self._names:
                self._writing[name] = trackers_lib.create(name)
                self._try(name, self._open)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        for name in list(self._writing):
            self._try(name, lambda one: one.close(failed=kind is not None))
        self._writing.clear()
        try:
            self.save()
        except errors.LakdError:
            if error is None:
                raise
            # Otherwise `error` is the reason: the run belongs to another process.
        finally:
            if self._mirror is not None:
                self._mirror.close()

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Records values; `kind` is "train" or "eval".

        Args:
          step: optimiser steps completed.
          kind: also the first part of the TensorBoard tags, "kind/name".
          values: scalars by name.

        Raises:
          ValueError: a value is named "step" or "kind".
        """
        clash = {"step", "kind"} & values.keys()
        if clash:
            raise ValueError(f"values: {sorted(clash)} are reserved names")
        numbers = {name: float(value) for name, value in values.items()}
        for name in list(self._writing):
            self._try(name, lambda one: one.write(int(step), kind, numbers))

    def save(self) -> None:
        """Puts what was written into a bucket; elsewhere it is on disk already.

        Raises:
          errors.LakdError: another process has taken over the run.
        """
        if self._mirror is None:
            return
        try:
            self._mirror.put()
        except OSError as error:
            if not self._warned:  # the next time it may succeed
                self._warn(self._describe("", error))
            self._warned = True

    def _open(self, one: tracker.Tracker) -> None:
        folder = self._mirror.folder
        folder.mkdir(parents=True, exist_ok=True)
        one.open(folder, self._about, self._resume_step)
        for record in read(folder) if one.replay else ():
            numbers = {n: v for n, v in record.items() if n not in ("step", "kind")}
            one.write(record["step"], record["kind"], numbers)

    def _try(self, name: str, action: Callable[[tracker.Tracker], None]) -> None:
        """Applies `action`; its first exception is reported and ends the tracker."""
        try:
            action(self._writing[name])
        except Exception as error:  # of any package, and the run is worth more
            self._warn(self._describe(name, error))
            failed = self._writing.pop(name)
            try:  # closing can fail for the same reason, which was reported
                failed.close(failed=True)
            except Exception:
                return

    def _describe(self, name: str, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) else None
        first = (str(error).splitlines() or [""])[0]
        reason = reason or f"{type(error).__name__}: {first}"
        if not name:
            return (
                f"warning: metrics cannot be written to {self._workdir} ({reason}); "
                "training continues without them"
            )
        return (
            f"warning: tracker {name} of {self._workdir} fails ({reason}); training "
            "continues without it"
        )
