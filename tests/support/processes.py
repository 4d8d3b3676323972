"""Python processes that tests start, and how they ended."""

import os
import socket
import subprocess
import sys

import commands


def start(*args, terminal=subprocess.PIPE, **environment):
    """Starts `python ARGS` in the root of the checkout, with these variables set.

    It prints into pipes, or to a terminal.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        stdout=terminal,
        stderr=terminal,
        text=True,
        cwd=commands.ROOT,
        env=os.environ | {"PYTHONPATH": str(commands.ROOT)} | environment,
    )


def ended(processes, timeout=240):
    """Returns [(exit code, stdout, stderr)]; a process that hangs fails the test."""
    try:
        outputs = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *out) for p, out in zip(processes, outputs, strict=True)]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
