"""The record of a run: metrics.jsonl and TensorBoard events."""

import contextlib
import json
import math
import os
import pathlib
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, Self

FILENAME = "metrics.jsonl"


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a run, oldest first; [] where there are none.

    Values that were not finite come back as NaN. A line cut short by a crash is
    left out.
    """
    try:
        lines = (pathlib.Path(workdir) / FILENAME).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = [_parse(line) for line in lines]
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in records
        if record is not None
    ]


class MetricWriter:
    """Writes metrics.jsonl and TensorBoard events into a run directory.

    A context manager; of several processes the first one alone writes. Records of a
    step should be written before the checkpoint of that step is: on resume,
    everything after `resume_step` is dropped and will be written again, so that the
    file ends up equal to that of an unbroken run.

    A failing disk does not stop training: the first OSError is reported once,
    after which nothing more is written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None,
        warn: Callable[[str], None] | None = None,
    ):
        """Prepares a writer; files are touched on entering the context.

        Args:
          workdir: run directory, created if missing.
          resume_step: step of the restored checkpoint, or None for a run from
            scratch, which drops all earlier records.
          warn: takes the one warning line; None prints it to stderr.
        """
        self._workdir = pathlib.Path(workdir)
        self._last_kept = -1 if resume_step is None else resume_step
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        self._lines: Any = None
        self._events: Any = None
        self._off = False

    def __enter__(self) -> Self:
        from lakd_jax.runtime import hosts

        self._off = not hosts.is_first()
        if not self._off:
            with self._or_off():
                self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        with self._or_off():
            self._close()

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Appends one record; `kind` is "train" or "eval".

        Args:
          step: optimiser steps completed.
          kind: also the first part of the TensorBoard tags, "kind/name".
          values: scalars by name; the names "step" and "kind" raise ValueError.
        """
        clash = {"step", "kind"} & values.keys()
        if clash:
            raise ValueError(f"values: {sorted(clash)} are names of the record itself")
        numbers = {name: float(value) for name, value in values.items()}
        if self._off:
            return
        with self._or_off():
            self._lines.write(_line(int(step), kind, numbers))
            self._lines.flush()
            self._write_event(int(step), summary=_scalars(kind, numbers))
            self._events.flush()

    def _open(self) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / FILENAME
        _drop_after(path, self._last_kept)
        self._lines = open(path, "ab")
        self._events = _open_events(self._workdir)
        self._write_event(0, file_version="brain.Event:2")
        # Makes TensorBoard hide what earlier processes logged at later steps.
        restart = {"status": 1}  # SessionLog.START
        self._write_event(self._last_kept + 1, session_log=restart)
        self._events.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto import event_pb2 as generated

        event_pb2: Any = generated  # made by protobuf while importing
        event = event_pb2.Event(step=step, wall_time=time.time(), **content)
        self._events.write(event.SerializeToString())

    def _close(self) -> None:
        files, self._lines, self._events = (self._lines, self._events), None, None
        with contextlib.ExitStack() as stack:  # closes both even if one fails
            for file in files:
                if file is not None:
                    stack.callback(file.close)

    @contextlib.contextmanager
    def _or_off(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._off:
                self._warn(
                    f"warning: metrics cannot be written to {self._workdir} "
                    f"({error.strerror or error}); training goes on without them"
                )
            self._off = True
            with contextlib.suppress(OSError):  # the same fault once more
                self._close()


def _line(step: int, kind: str, numbers: dict[str, float]) -> bytes:
    # JSON has no NaN; null keeps the file readable by every parser.
    values = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
    return json.dumps({"step": step, "kind": kind, **values}).encode() + b"\n"


def _scalars(kind: str, numbers: dict[str, float]) -> Any:
    from tensorboardX.proto import summary_pb2 as generated

    summary_pb2: Any = generated  # made by protobuf while importing
    value = summary_pb2.Summary.Value
    return summary_pb2.Summary(
        value=[value(tag=f"{kind}/{n}", simple_value=v) for n, v in numbers.items()]
    )


def _open_events(workdir: pathlib.Path) -> Any:
    # The record file rather than SummaryWriter: that one hands events to a thread
    # which dies when the disk is full, and the next write then waits for ever.
    import tensorboardX

    seconds, rest = divmod(time.time_ns(), 10**9)
    # TensorBoard reads files in order of name; two in a second must stay in order.
    name = f"events.out.tfevents.{seconds}.{socket.gethostname()}.{rest:09d}"
    return tensorboardX.RecordWriter(str(workdir / name))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _drop_after(path: pathlib.Path, last_kept: int) -> None:
    """Rewrites `path` without the records of steps after `last_kept`."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        record = _parse(line)
        if record is not None and record["step"] <= last_kept:
            kept.append(line + b"\n")
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
