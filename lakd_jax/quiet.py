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
    closes its event loop, and every other read then under way ends in a traceback
    on stderr. What matters of both reaches the caller as an exception.
    """
    logging.getLogger("absl").addFilter(_is_foreign)
    sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def _is_foreign(record: logging.LogRecord) -> bool:
    return f"orbax{os.sep}checkpoint" not in record.pathname


def _report(previous: Any, unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)
