"""SIGTERM, SIGHUP, Ctrl-C: the first saves and stops, the second kills."""

import os
import pty
import signal
import threading
import time

import processes
import pytest

from lakd_jax.runtime import interrupt

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ALL = (*SIGNALS, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _hang_ups_are_not_ignored():
    """As in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def _send(number):
    os.kill(os.getpid(), number)


def _handlers():
    return [signal.getsignal(number) for number in ALL]


@pytest.mark.parametrize("number", ALL)
def test_first_signal_sets_the_flag_and_says_so(number, capfd):
    """Promise 11: for SIGTERM, Ctrl-C and SIGHUP."""
    before = _handlers()
    with interrupt.Guard() as guard:
        guard.check()
        _send(number)
        assert guard.requested
        with pytest.raises(interrupt.Interrupted):
            guard.check()
        with pytest.raises(interrupt.Interrupted):
            with guard.released():
                pytest.fail("was entered")
    assert _handlers() == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(signal.Signals(number).name)
    assert "save and stop" in line


def test_the_same_sigterm_delivered_twice_does_not_kill(capfd):
    with interrupt.Guard() as guard:
        _send(signal.SIGTERM)
        _send(signal.SIGTERM)
        assert guard.requested
    assert capfd.readouterr().err.count("\n") == 1


def test_a_second_hang_up_does_not_kill(capfd, monkeypatch):
    """A shell passes on what the terminal has already sent."""
    monkeypatch.setattr(interrupt, "_DUPLICATE_SECONDS", -1.0)
    with interrupt.Guard() as guard:
        _send(signal.SIGHUP)
        _send(signal.SIGHUP)
        assert guard.requested
    assert capfd.readouterr().err.count("\n") == 1


def test_an_ignored_hang_up_stays_ignored():
    """Promise 11: as under nohup."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.Guard() as guard:
            _send(signal.SIGHUP)
            guard.check()
    finally:
        signal.signal(signal.SIGHUP, usual)


_TALKATIVE = """
import sys, time
from lakd_jax.runtime import interrupt
with interrupt.Guard() as guard:
    print("ready", flush=True)
    while not guard.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").close()
"""


def test_a_closed_terminal_does_not_end_a_save(tmp_path):
    """Promise 11: printing to it fails, and the last file is written all the same."""
    master, slave = pty.openpty()
    process = processes.start("-c", _TALKATIVE, tmp_path / "saved", terminal=slave)
    os.close(slave)
    with open(master, "rb", buffering=0) as shown:
        # The whole line: to write the end of it would fail before the signal comes.
        assert b"".join(iter(lambda: shown.read(1), b"\n")) == b"ready\r"
    process.send_signal(signal.SIGHUP)  # the kernel does, to the terminal's session
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "saved").exists()


def test_released_signals_have_their_usual_effect(capfd):
    """Promise 9: the previous handlers during the call, the guard's afterwards."""
    usual = _handlers()
    with interrupt.Guard() as guard:
        caught = _handlers()
        with pytest.raises(ZeroDivisionError), guard.released():
            assert _handlers() == usual
            raise ZeroDivisionError
        assert _handlers() == caught
        _send(signal.SIGTERM)
        assert guard.requested
    assert capfd.readouterr().err.count("\n") == 1


def test_without_handlers_nothing_is_released():
    found = []

    def notebook():
        with interrupt.Guard() as guard, guard.released():
            guard.check()
            found.append(_handlers())

    thread = threading.Thread(target=notebook)
    thread.start()
    thread.join()
    assert found == [_handlers()]


_COMPILE = """
import time
import jax
import jax.numpy as jnp
from lakd_jax import cli
from lakd_jax.runtime import backend

def slow(x):
    for i in range(1500):
        x = jnp.sin(x) * x[::-1] + i
    return x

lowered = jax.jit(slow).lower(jnp.ones(64))

def work(guard):
    print("compiling", flush=True)
    backend.compiled(lowered, guard)
    print("compiled", flush=True)

cli.end_with(work)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_during_a_compilation_ends_the_process_at_once(number):
    """Promise 9: without waiting for the compiler, also for Ctrl-C."""
    process = processes.start("-c", _COMPILE)
    try:
        assert process.stdout.readline() == "compiling\n"
        time.sleep(0.2)
        process.send_signal(number)
        (result,) = processes.ended([process], timeout=60)
    finally:
        process.kill()  # or a failed test leaves a compiler that takes all memory
    assert result == (-number, "", "")  # never "compiled"


_STUBBORN = """
import time
from lakd_jax.runtime import interrupt
interrupt._DUPLICATE_SECONDS = 0.2
with interrupt.Guard() as guard:
    print("ready", flush=True)
    while True:
        time.sleep(30)
"""


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_second_signal_kills(first, second):
    """Promise 11: at once."""
    process = processes.start("-c", _STUBBORN)
    process.stdout.readline()
    process.send_signal(first)
    assert "save and stop" in process.stderr.readline()
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=10) == -second
    process.communicate()
