"""Runs one training as a process of its own and reports its memory and its error.

    python -m benchmarks.one REPORT.json --config=FILE --workdir=DIR ...
    python -m benchmarks.one check < COMMANDS.json

`benchmarks.table` starts these: a run that crashes, or is killed for its memory, does
not end the others, and its peak memory is its own. The second form trains nothing; it
prints the device and the faults of each command, because the process that starts the
runs must not occupy an accelerator itself.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lakd_jax import cli, errors
from lakd_jax.config import check as check_lib
from lakd_jax.config import command_line
from lakd_jax.runs import command as command_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir

_POLL_SECONDS = 1.0


def check(commands: Sequence[list[str]]) -> dict[str, Any]:
    """Returns the device and every fault of the commands' configurations, once each."""
    devices, faults = jax.devices(), []
    for command in commands:
        try:
            config, _, _ = command_line.parse(command)
            faults += check_lib.problems(config, len(devices))
        except errors.ConfigError as error:
            faults += error.problems
    return {
        "platform": devices[0].platform,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "problems": list(dict.fromkeys(faults)),
    }


def memory() -> dict[str, int | None]:
    """Returns peaks in bytes of the first device, if it counts, and of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": stats.get("peak_bytes_in_use"), "process": peak * unit}


def run(report: Path, command: list[str], guard: interrupt.Guard) -> None:
    """Trains, and writes the memory or the error to `report`; nothing if stopped."""
    try:
        config, directory, _ = command_line.parse(command)
        command_lib.run(config, directory, guard=guard)
    except interrupt.Interrupted:
        raise
    except BaseException as error:
        workdir.write_json(report, {"error": f"{type(error).__name__}: {error}"})
        raise
    workdir.write_json(report, {"memory": memory()})


def _end_with(parent: int) -> None:
    """Stops this process, as SIGTERM does, once its parent has died."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Reads the command line of either form."""
    if sys.argv[1:] == ["check"]:
        print(json.dumps(check(json.load(sys.stdin))))
        return
    _end_with(os.getppid())
    report, command = Path(sys.argv[1]), sys.argv[2:]
    cli.end_with(lambda guard: run(report, command, guard))


if __name__ == "__main__":
    main()
