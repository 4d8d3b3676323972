"""SIGTERM and Ctrl-C: finish the step, save, stop.

Python runs a signal handler only between bytecodes of the main thread, so a signal
that comes while this thread is inside an XLA compilation is seen minutes later.
Long calls therefore go through `Guard.run`, which puts them in a worker thread.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_SECONDS = 0.05
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
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def check(self) -> None:
        """Raises `Interrupted` once a signal has come."""
        if self.requested:
            raise Interrupted

    def abandon(self) -> None:
        """Raises `Interrupted` if a call under way is to be left."""
        self.check()

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Calls `function(*args)` so that a signal ends the wait within 0.1 s.

        The call runs in another thread: settings that JAX keeps per thread (`with
        jax.default_device(...)`, `jax.set_mesh`) must be made inside `function`. When
        a signal comes the thread is abandoned; end the process with `exit_now`, as
        the interpreter cannot take down a thread that is inside XLA.

        Raises:
          Interrupted: a signal came, before or during the call.
        """
        self.abandon()
        if not self._previous:
            return function(*args)
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        threading.Thread(
            target=_call, args=(future, function, args), daemon=True
        ).start()
        while not future.done():
            concurrent.futures.wait([future], timeout=_POLL_SECONDS)
            self.abandon()
        return future.result()

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


def exit_now(code: int) -> NoReturn:
    """Flushes what is written and ends the process without the interpreter's own exit.

    That exit crashes or waits when a thread is still compiling in XLA. Open files
    and checkpoints must be closed before.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)


def _call(
    future: concurrent.futures.Future, function: Callable, args: tuple[Any, ...]
) -> None:
    try:
        future.set_result(function(*args))
    except BaseException as error:  # handed to the waiting thread as it is
        future.set_exception(error)
