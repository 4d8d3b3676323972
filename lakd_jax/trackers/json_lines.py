"""metrics.jsonl, which every run has: one line per record."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lakd_jax.trackers import tracker

FILENAME = "metrics.jsonl"


class JsonLines(tracker.Tracker):
    """Writes metrics.jsonl.

    Records after the restored step are dropped and written again, so the file ends up
    identical to that of an uninterrupted run.
    """

    replay = False

    def __init__(self):
        self._lines: Any = None

    def open(
        self, directory: pathlib.Path, about: tracker.About, resume_step: int | None
    ) -> None:
        """Opens the file and drops what comes after `resume_step`."""
        _drop_after(directory / FILENAME, -1 if resume_step is None else resume_step)
        self._lines = open(directory / FILENAME, "ab")

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Appends a line."""
        # JSON has no NaN; null keeps the file readable by every parser.
        numbers = {n: v if math.isfinite(v) else None for n, v in values.items()}
        line = json.dumps({"step": step, "kind": kind, **numbers})
        self._lines.write(line.encode() + b"\n")
        self._lines.flush()

    def close(self, failed: bool) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()


def parse(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a line; None if a crash cut it short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _drop_after(path: pathlib.Path, last_kept: int) -> None:
    """Rewrites `path` without the records after step `last_kept`."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        record = parse(line)
        if record is not None and record["step"] <= last_kept:
            kept.append(line + b"\n")
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
