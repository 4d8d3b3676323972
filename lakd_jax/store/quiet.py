"""Silences Orbax's internal logging."""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any


@functools.cache
def install() -> None:
    """Filters out Orbax's log records and its tracebacks for abandoned reads.

    It logs 48 lines per save through absl's logger. When one leaf cannot be read it
    closes its event loop: every other read then causes a traceback on stderr, or in
    asyncio's log if that read had also failed. All relevant errors reach the caller as
    exceptions.
    """
    logging.getLogger("absl").addFilter(_is_foreign)
    logging.getLogger("asyncio").addFilter(_is_not_abandoned_read)
    sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def _is_foreign(record: logging.LogRecord) -> bool:
    return f"orbax{os.sep}checkpoint" not in record.pathname


def _is_not_abandoned_read(record: logging.LogRecord) -> bool:
    # A read is a TensorStore future ("Error reading ..."), wrapped in a task.
    text = record.getMessage()
    is_read = "_wrap_awaitable" in text or "Error reading" in text
    return not (is_read and "exception was never retrieved" in text)


def _report(previous: Any, unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)
