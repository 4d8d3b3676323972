"""Keeps what Orbax says about its own workings off the terminal."""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any


@functools.cache
def install() -> None:
    """Drops Orbax's log records and its complaints about reads it gave up.

    It logs 48 lines a save through absl's logger. When one leaf cannot be read it
    closes its event loop: every other read then ends in a traceback on stderr, or
    in asyncio's log if it failed, too, before. What matters of all of them reaches
    the caller as an exception.
    """
    logging.getLogger("absl").addFilter(_is_foreign)
    logging.getLogger("asyncio").addFilter(_is_not_unread)
    sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def _is_foreign(record: logging.LogRecord) -> bool:
    return f"orbax{os.sep}checkpoint" not in record.pathname


def _is_not_unread(record: logging.LogRecord) -> bool:
    # A read is a future of TensorStore's ("Error reading ..."), in a wrapper's task.
    text = record.getMessage()
    unread = "_wrap_awaitable" in text or "Error reading" in text
    return not (unread and "exception was never retrieved" in text)


def _report(previous: Any, unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)
