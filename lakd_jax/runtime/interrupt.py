"""Handles SIGTERM, SIGHUP and Ctrl-C: finish the step, save, stop.

Python runs signal handlers only between bytecodes of the main thread, so a signal that
arrives while this thread is inside an XLA compilation would be handled minutes later.
Therefore `Guard.released` restores the previous handlers during such calls.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# SIGHUP: the terminal was closed, e.g. an ssh connection broke. Windows has none.
_HANG_UP: Any = getattr(signal, "SIGHUP", None)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *([_HANG_UP] if _HANG_UP else []))
# `timeout` and container runtimes deliver one SIGTERM twice, moments apart.
_DUPLICATE_SECONDS = 1.0


class Interrupted(Exception):
    """A signal was received: save the last finished step and stop."""


class Guard:
    """A context manager that turns the first signal into a flag.

    A second Ctrl-C, or a second SIGTERM more than one second after the first, kills the
    process; a second SIGHUP does not. If SIGHUP is ignored, as under nohup, it stays
    ignored. Outside the main thread (e.g. in a notebook's worker), where Python allows
    no handlers, it does nothing. Keep it open until the last save is on disk.
    """

    def __init__(self) -> None:
        self.requested = False
        # Called last by `cli.end_with`, with the exit code.
        self.leave: Callable[[int], None] = lambda code: None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Guard:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == _HANG_UP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._install(self._previous)
        self._previous = {}

    def check(self) -> None:
        """Raises `Interrupted` once a signal has been received."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Restores the previous signal handlers during a long call.

        SIGTERM then ends the process at once. Only work since the last checkpoint is
        lost: nothing is written to a run during such calls.

        Raises:
          Interrupted: a signal was received before the call.
        """
        self.check()
        if not self._previous:
            yield
            return
        handlers = {number: signal.getsignal(number) for number in self._previous}
        self._install(self._previous)
        try:
            yield
        finally:
            self._install(handlers)

    @staticmethod
    def _install(handlers: Mapping[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        if number == _HANG_UP:
            _silence()
        if self.requested:
            if (
                number != _HANG_UP
                and time.monotonic() - self._since > _DUPLICATE_SECONDS
            ):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.requested, self._since = True, time.monotonic()
        # Set now, since the second one must kill even while no bytecode is executed.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        name = signal.Signals(number).name
        line = f"{name}: will save and stop; Ctrl-C (again) stops at once.\n"
        with contextlib.suppress(OSError):
            # Not print: the signal may have interrupted another print.
            os.write(2, line.encode())


def _silence() -> None:
    """Discards what is printed to a terminal that is gone.

    Otherwise the next line would be an error, and end the run before it saves.
    """
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, 0)
    gone = [output for output, _ in poll.poll(0)]
    if gone:
        null = os.open(os.devnull, os.O_WRONLY)
        for output in gone:
            os.dup2(null, output)
        os.close(null)
