"""SIGTERM and Ctrl-C: finish the step, save, stop.

Python runs a signal handler only between bytecodes of the main thread, so a signal
that comes while this thread is inside an XLA compilation would be seen minutes later.
`Guard.released` therefore gives signals their usual effect during such calls.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# `timeout` and container runtimes deliver one SIGTERM twice, moments apart.
_DUPLICATE_SECONDS = 1.0


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came: save the last finished step and stop."""


class Guard:
    """Context manager that turns the first signal into a flag.

    A second Ctrl-C, or a second SIGTERM later than a second after the first, kills.
    Outside the main thread (a notebook's worker, say), where Python allows no
    handlers, it does nothing. Keep it open until the last save is on disk.
    """

    def __init__(self) -> None:
        self.requested = False
        # What `cli.end_with` calls last, with the exit code.
        self.leave: Callable[[int], None] = lambda code: None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Guard:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._previous)
        self._previous = {}

    def check(self) -> None:
        """Raises `Interrupted` once a signal has come."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Gives signals the effect that they had before, while a long call runs.

        SIGTERM then ends the process at once. What that loses is at most what was done
        since the last checkpoint: nothing is written to a run during such calls.

        Raises:
          Interrupted: a signal has come before the call.
        """
        self.check()
        if not self._previous:
            yield
            return
        handlers = {number: signal.getsignal(number) for number in self._previous}
        self._set(self._previous)
        try:
            yield
        finally:
            self._set(handlers)

    @staticmethod
    def _set(handlers: Mapping[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._since > _DUPLICATE_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.requested, self._since = True, time.monotonic()
        # Now, not at the second one: it must kill even when Python is not running.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        name = signal.Signals(number).name
        line = f"{name}: will save and stop; Ctrl-C (again) stops at once.\n"
        with contextlib.suppress(OSError):
            # Not print: the signal may have come in the middle of another print.
            os.write(2, line.encode())
