"""Training with several processes: connecting, comparing, waiting and stopping.

Each process loads all data, holds the full state and computes its share of every batch;
only process 0 writes and prints. All must call the functions of this module in the same
order, since most of them communicate. With one process they do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lakd_jax import errors
from lakd_jax.runtime import interrupt, launchers

Result = TypeVar("Result")

# A process without a heartbeat for this long is considered lost, which ends all.
_HEARTBEAT_SECONDS = 30
CONNECT_SECONDS = 120
_NOTICE_SECONDS = 5
# JAX ends a process that waited too long with a stack trace; `connect` comes first.
_MARGIN_SECONDS = 60
# An exchange takes 2 ms over loopback, and waits for the device.
_CHECKS_PER_EXCHANGE = 8
# Process 0 exits last, since its exit aborts the others before they report errors.
_LINGER_SECONDS = 2
_PAD = 4096  # bytes; messages of similar length share a compiled program
_SHOWN = 6
AUTO = "auto"  # --coordinator=auto: as set by Slurm, a TPU pod, Kubernetes or MPI
NONE = "none"  # --coordinator=none: not even if one of these started several processes


def fault(
    coordinator: str,
    num_processes: int | None,
    process_id: int | None,
    wait: int | None = None,
) -> str:
    """Describes what is wrong with the four flags ("" or None: not given), or ""."""
    if wait is not None and wait < 1:
        return f"--wait must be at least 1 second, is {wait}"
    alone = num_processes is None and process_id is None
    if coordinator == AUTO:
        fault = "--coordinator=auto finds --num_processes and --process_id: omit them"
        return "" if alone else fault
    if coordinator == NONE:
        alone = alone and wait is None
        others = "--num_processes, --process_id and --wait"
        return "" if alone else f"--coordinator=none connects nothing: omit {others}"
    given = {
        "--coordinator": bool(coordinator),
        "--num_processes": num_processes is not None,
        "--process_id": process_id is not None,
    }
    missing = [flag for flag, is_given in given.items() if not is_given]
    if num_processes is None or process_id is None or missing:
        if len(missing) == len(given):
            return ""
        return f"{' and '.join(missing)} missing: {', '.join(given)} go together"
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if not port or not 0 < int(port[1]) < 2**16:
        return f"--coordinator must be HOST:PORT of process 0, is {coordinator!r}"
    if num_processes < 1:
        return f"--num_processes must be at least 1, is {num_processes}"
    if not 0 <= process_id < num_processes:
        return (
            f"--process_id must be from 0 to {num_processes - 1} "
            f"(--num_processes={num_processes}), is {process_id}"
        )
    return ""


def join(
    coordinator: str,
    num_processes: int | None,
    process_id: int | None,
    wait: int | None = None,
) -> bool:
    """Connects this process to the others of its run; returns whether there are any.

    Without flags, processes that a launcher has started together are connected, which
    is reported in one line. A process that was started alone is not delayed.

    Args:
      coordinator: HOST:PORT, `AUTO`, `NONE`, or "" if the flag is not given.
      num_processes: see `connect`.
      process_id: see `connect`.
      wait: see `connect`; None for `CONNECT_SECONDS`.

    Raises:
      errors.HostsError: see `connect`.
    """
    job = launchers.find() if coordinator in ("", AUTO) else None
    if coordinator == NONE or not (coordinator or job):
        return False
    seconds = wait or CONNECT_SECONDS
    connect(coordinator or AUTO, num_processes, process_id, seconds, job)
    if not coordinator and job and is_first():
        print(
            f"{job.launcher} started {job.count} processes: they train one run "
            "together (--coordinator=none: a run in each).",
            file=sys.stderr,
        )
    return True


def connect(
    coordinator: str,
    num_processes: int | None,
    process_id: int | None,
    wait: int = CONNECT_SECONDS,
    job: launchers.Job | None = None,
) -> None:
    """Connects all processes; must be called before JAX's devices are initialised.

    If one does not connect in time, the others print why and end with exit code 2. If
    one is lost later, JAX aborts the others with a message and a stack trace.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached; with `AUTO` JAX
        detects it from what started the processes (Slurm, a TPU pod, Kubernetes, Open
        MPI).
      num_processes: number of processes; None with `AUTO`.
      process_id: number of this process; None with `AUTO`.
      wait: seconds to wait for the others.
      job: what is known about them with `AUTO`, for messages.

    Raises:
      errors.HostsError: JAX's devices are already initialised, or JAX cannot connect
        for another reason.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM from `Guard`, and Orbax queries it with step numbers of its
    # own.
    jax.config.update("jax_enable_preemption_service", False)
    auto = coordinator == AUTO
    who = f"process {process_id} of {num_processes}, at {coordinator}"
    who = str(job or "--coordinator=auto") if auto else who
    try:
        with _patience(who, wait, is_server=process_id == 0):
            jax.distributed.initialize(
                None if auto else coordinator,
                num_processes,
                process_id,
                cluster_detection_method=None if auto else "deactivate",
                initialization_timeout=wait + _MARGIN_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
            )
    except ValueError as error:
        if not auto:
            raise
        raise errors.HostsError(
            f"{who}: JAX finds no Slurm, TPU pod, Kubernetes or MPI here ({error}).\n"
            "Set --coordinator=HOST:PORT, --num_processes, --process_id, or "
            "--coordinator=none for a run in this process alone."
        ) from error
    except RuntimeError as error:
        raise errors.HostsError(
            f"the processes cannot connect: {error}\n"
            "The file of --config must not compute with JAX: it is read before."
        ) from error


@contextlib.contextmanager
def _patience(who: str, seconds: int, is_server: bool) -> Iterator[None]:
    """Reports a wait for other processes, and ends this one when it takes too long."""

    def notice() -> None:
        print(f"{who}: waiting for the others, at most {seconds} s", file=sys.stderr)

    def give_up() -> None:
        print(
            f"{who}: not all processes have connected within {seconds} s.\n"
            "Start all of them within that time, or set --wait=SECONDS; the port must "
            "be open between the hosts. --coordinator=none runs this process alone.",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_LINGER_SECONDS if is_server else 0)
        os._exit(errors.HostsError.exit_code)  # JAX's call cannot be interrupted

    timers = [
        threading.Timer(_NOTICE_SECONDS, notice),
        threading.Timer(seconds, give_up),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def leave(code: int) -> None:
    """Disconnects this process, as its last action before it exits with `code`."""
    if code == 0:
        jax.distributed.shutdown()  # waits for the others
    elif is_first():
        time.sleep(_LINGER_SECONDS)


def require_connected() -> None:
    """Raises HostsError if JAX has several processes that are not connected.

    Initialises JAX's devices. On a TPU pod each process would otherwise act as the
    first, and all would write the same files.

    Raises:
      errors.HostsError: the message explains how to connect them.
    """
    if jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    raise errors.HostsError(
        f"JAX has {jax.process_count()} processes here, but they are not connected: "
        "add --coordinator=auto to the command of each.\n"
        "From Python, restart and call jax.distributed.initialize() first, before "
        "any other call of JAX."
    )


def count() -> int:
    """Returns the number of processes; initialises no devices if there is only one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Returns whether this process writes and prints."""
    return count() == 1 or jax.process_index() == 0


def notifier(notify: Callable[[str], None]) -> Callable[[str], None]:
    """Returns `notify` on process 0, and a function that does nothing elsewhere."""
    return notify if is_first() else lambda text: None


def first(work: Callable[[], Any]) -> Any:
    """Calls `work` on process 0 only; all processes wait and return its result.

    Args:
      work: must not compute across processes; its result must be JSON-serialisable.

    Raises:
      errors.LakdError, OSError: on process 0, if `work` does.
      errors.HostsError: on the others, if `work` fails.
    """
    if count() == 1:
        return work()
    message: dict[str, Any] = {}
    if is_first():
        try:
            message["value"] = work()
        except (errors.LakdError, OSError) as error:
            _gather(json.dumps({"fault": str(error)}))
            raise
    message = json.loads(_gather(json.dumps(message))[0])
    if "fault" in message:
        raise errors.HostsError(f"process 0 stopped: {message['fault']}")
    return message["value"]


def in_turn(work: Callable[[], Result]) -> Result:
    """Calls `work` on process 0, then on the others, which can read its files."""
    results: list[Result] = []
    first(lambda: results.append(work()))
    return results[0] if results else work()


def agree(values: Mapping[str, Any]) -> None:
    """Raises HostsError on all processes unless `values` are equal on all of them.

    Args:
      values: JSON-serialisable, by a name for the message.

    Raises:
      errors.HostsError: names the values that differ, with both.
    """
    if count() == 1:
        return
    gathered = [json.loads(text) for text in _gather(json.dumps(values))]
    reference = gathered[0]
    for number, other in enumerate(gathered):
        differences = [
            f"  {name}: {reference.get(name)!r} in process 0, {other.get(name)!r} in it"
            for name in sorted(reference.keys() | other.keys())
            if reference.get(name) != other.get(name)
        ]
        if differences:
            raise errors.HostsError(
                f"process {number} differs from process 0 in {len(differences)} "
                "values:\n"
                + "\n".join(differences[:_SHOWN])
                + "\nUse the same command, code, data and folders for all processes, "
                "or --coordinator=none for a run in each."
            )


def agree_on_arrays(name: str, tree: Any) -> None:
    """Calls `agree` on a checksum of `tree`'s arrays (NumPy or local to a process)."""
    if count() == 1:
        return
    crc = 0
    for leaf in jax.tree.leaves(tree):
        crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    agree({f"checksum of {name}": crc})


def guard() -> interrupt.Guard:
    """Returns the guard that stops a run on signals, for one or several processes."""
    return interrupt.Guard() if count() == 1 else Guard()


class Guard(interrupt.Guard):
    """Stops all processes after the same step, whichever of them received the signal.

    They exchange the flag at every eighth check, so a stop takes up to eight steps (or
    evaluation batches, or dispatches) longer than with one process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._checks = 0

    def check(self) -> None:
        """Raises `Interrupted` once any process has received a signal.

        All processes must call it equally often.
        """
        self._checks += 1
        if self._checks % _CHECKS_PER_EXCHANGE:
            return
        if np.any(multihost_utils.process_allgather(np.bool_(self.requested))):
            raise interrupt.Interrupted

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Does nothing: the others would hang if this process ended during a call."""
        yield


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises HostsError if another process is lost, instead of JAX's error.

    Applies to CPU; on other devices JAX ends the process itself, see `connect`.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if count() == 1 or "Gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise errors.HostsError(
            f"another process was lost; see its output for the cause. ({reason:.120})\n"
            "The same commands resume from the last checkpoint."
        ) from error


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes, in the order of their numbers."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(encoded.size))
    padded = np.zeros(-(-int(sizes.max()) // _PAD) * _PAD, np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
    ]
