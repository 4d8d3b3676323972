"""SIGTERM and Ctrl-C: one to save and stop, at any moment; another to kill."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lakd_jax.runtime import interrupt


def _send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_the_flag_and_says_so(number, capfd):
    """Promise 11: SIGTERM and Ctrl-C alike."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with interrupt.Guard() as guard:
        guard.check()
        _send(number)
        assert guard.requested
        with pytest.raises(interrupt.Interrupted):
            guard.check()
        with pytest.raises(interrupt.Interrupted):
            guard.run(pytest.fail, "was called")
    assert {n: signal.getsignal(n) for n in before} == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(signal.Signals(number).name)
    assert "save and stop" in line


def test_the_same_sigterm_delivered_twice_does_not_kill(capfd):
    with interrupt.Guard() as guard:
        _send(signal.SIGTERM)
        _send(signal.SIGTERM)
        assert guard.requested
    assert capfd.readouterr().err.count("\n") == 1


def test_run_returns_and_raises_what_the_call_does():
    with interrupt.Guard() as guard:
        assert guard.run(divmod, 17, 5) == (3, 2)
        with pytest.raises(ZeroDivisionError) as caught:
            guard.run(divmod, 17, 0)
        assert caught.traceback[-1].name == "_call"
        thread = guard.run(threading.current_thread)
        assert thread is not threading.main_thread()
        assert thread.daemon


def test_run_is_left_as_soon_as_a_signal_comes():
    release, returned = threading.Event(), threading.Event()

    def work():
        _send(signal.SIGTERM)
        release.wait(30)
        returned.set()

    with interrupt.Guard() as guard, pytest.raises(interrupt.Interrupted):
        guard.run(work)
    assert not returned.is_set()
    release.set()


def test_without_handlers_it_only_calls():
    found = []

    def notebook():
        with interrupt.Guard() as guard:
            guard.check()
            found.append(guard.run(threading.current_thread))

    thread = threading.Thread(target=notebook)
    thread.start()
    thread.join()
    assert found == [thread]
    assert interrupt.Guard().run(threading.current_thread) is threading.main_thread()


def _start(code):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_COMPILE = """
import time
import jax
import jax.numpy as jnp
from lakd_jax.runtime import interrupt

def slow(x):
    for i in range(1500):
        x = jnp.sin(x) * x[::-1] + i
    return x

lowered = jax.jit(slow).lower(jnp.ones(64))

def compile():
    print("compiling", flush=True)
    lowered.compile()
    print("compiled", flush=True)

with interrupt.Guard() as guard:
    try:
        guard.run(compile)
    except interrupt.Interrupted:
        print("saved", end="")
        interrupt.exit_now(0)
"""


def test_signal_during_a_compilation_ends_it_at_once():
    """Promise 9: nobody waits for the compiler."""
    process = _start(_COMPILE)
    assert process.stdout.readline() == "compiling\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "saved")  # and never "compiled"
    assert err.count("\n") == 1


_STUBBORN = """
import time
from lakd_jax.runtime import interrupt
interrupt._DUPLICATE_SECONDS = 0.2
with interrupt.Guard() as guard:
    print("ready", flush=True)
    while True:
        time.sleep(30)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
    ],
)
def test_second_signal_kills(first, second):
    """Promise 11: who asks twice does not want to wait."""
    process = _start(_STUBBORN)
    process.stdout.readline()
    process.send_signal(first)
    assert "save and stop" in process.stderr.readline()
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=10) == -second
    process.communicate()


_EXIT = """
import logging, sys, threading, time
from lakd_jax.runtime import interrupt
threading.Thread(target=time.sleep, args=(60,)).start()
print("out", end="")
sys.stderr.write("err")
interrupt.exit_now(7)
"""


def test_exit_now_flushes_and_waits_for_nothing():
    process = _start(_EXIT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (7, "out", "err")
