"""Several processes that train together: how they meet, agree, wait and stop.

Each loads the whole data, holds the whole state and computes its share of every batch;
process 0 alone writes and prints. All must come by the functions here in the same
order, as most of them exchange something. Of one process they ask nothing.
"""

from __future__ import annotations

import contextlib
import json
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
from lakd_jax.runtime import interrupt

Result = TypeVar("Result")

# After this long without a sign of life a process counts as dead, which ends all.
_HEARTBEAT_SECONDS = 30
_CONNECT_SECONDS = 120
_SAY_SECONDS = 5
# An exchange takes 2 ms over loopback, and waits for the device.
_CHECKS_AN_EXCHANGE = 8
# Process 0 leaves last, as its end aborts all others before they say why they stop.
_LINGER_SECONDS = 2
_PAD = 4096  # bytes; messages of like length share a compiled program
_SHOWN = 6
AUTO = "auto"  # as --coordinator: what Slurm, a TPU pod, Kubernetes or MPI says


def fault(coordinator: str, num_processes: int | None, process_id: int | None) -> str:
    """What is wrong with the three flags, each empty or None if not given; or ""."""
    if coordinator == AUTO:
        alone = num_processes is None and process_id is None
        fault = "--coordinator=auto finds --num_processes and --process_id: leave them"
        return "" if alone else f"{fault} out"
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


def connect(
    coordinator: str, num_processes: int | None, process_id: int | None
) -> None:
    """Waits for all processes; to be called before anything starts JAX's devices.

    Where one does not come in time, or is lost later, JAX aborts the others with a
    message and a stack.

    Args:
      coordinator: HOST:PORT where process 0 can be reached; `AUTO` asks what started
        the processes (Slurm, a TPU pod, Kubernetes, Open MPI), as JAX does.
      num_processes: how many there are; None with `AUTO`.
      process_id: which of them this is; None with `AUTO`.

    Raises:
      errors.HostsError: JAX has started its devices, or refuses for another reason.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM from `Guard`, and Orbax asks it with numbers of its own.
    jax.config.update("jax_enable_preemption_service", False)
    auto = coordinator == AUTO
    who = "" if auto else f"process {process_id} of {num_processes}: "
    place = "" if auto else f" at {coordinator}"
    line = f"{who}waiting for the others{place}, at most {_CONNECT_SECONDS} s"
    late = threading.Timer(_SAY_SECONDS, print, [line], {"file": sys.stderr})
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if auto else "deactivate",
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if not auto:
            raise
        raise errors.HostsError(
            "--coordinator=auto: JAX finds no Slurm, TPU pod, Kubernetes or MPI here "
            f"({error}). Give --coordinator=HOST:PORT, --num_processes, --process_id."
        ) from error
    except RuntimeError as error:
        raise errors.HostsError(
            f"the processes cannot meet: {error}\n"
            "The file of --config must not compute with JAX: it is read before."
        ) from error
    finally:
        late.cancel()


def leave(code: int) -> None:
    """To be called at the end of a connected process that exits with `code`."""
    if code == 0:
        jax.distributed.shutdown()  # waits for the others
    elif is_first():
        time.sleep(_LINGER_SECONDS)


def require_connected() -> None:
    """Stops processes that JAX counts but has not connected; starts its devices.

    On a TPU pod each would take itself for the first: all would write the same files.

    Raises:
      errors.HostsError: saying how they are connected.
    """
    if jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    raise errors.HostsError(
        f"JAX has {jax.process_count()} processes here, but they are not connected: "
        "add --coordinator=auto to the command of each.\n"
        "From Python, start anew and call jax.distributed.initialize() first, before "
        "anything else of JAX."
    )


def count() -> int:
    """How many processes train together; does not start JAX's devices for one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes and prints."""
    return count() == 1 or jax.process_index() == 0


def notifier(notify: Callable[[str], None]) -> Callable[[str], None]:
    """`notify` on process 0; elsewhere a function that does nothing."""
    return notify if is_first() else lambda text: None


def first(work: Callable[[], Any]) -> Any:
    """Does `work` on process 0 alone; all wait for it and return what it did.

    Args:
      work: computes nothing over several processes; gives what JSON can hold.

    Raises:
      errors.LakdError, OSError: as `work`, on process 0.
      errors.HostsError: on the others when it did.
    """
    if count() == 1:
        return work()
    told: dict[str, Any] = {}
    if is_first():
        try:
            told["value"] = work()
        except (errors.LakdError, OSError) as error:
            _gather(json.dumps({"fault": str(error)}))
            raise
    told = json.loads(_gather(json.dumps(told))[0])
    if "fault" in told:
        raise errors.HostsError(f"process 0 stopped: {told['fault']}")
    return told["value"]


def in_turn(work: Callable[[], Result]) -> Result:
    """Does `work` on process 0, then on the others, who find what it left on disk."""
    done: list[Result] = []
    first(lambda: done.append(work()))
    return done[0] if done else work()


def agree(values: Mapping[str, Any]) -> None:
    """Stops all processes unless `values`, which JSON can hold, are the same on all.

    Raises:
      errors.HostsError: naming what differs, with both values.
    """
    if count() == 1:
        return
    told = [json.loads(text) for text in _gather(json.dumps(values))]
    for number, other in enumerate(told):
        differ = [
            f"  {name}: {told[0].get(name)!r} in process 0, {other.get(name)!r} in it"
            for name in sorted(told[0].keys() | other.keys())
            if told[0].get(name) != other.get(name)
        ]
        if differ:
            raise errors.HostsError(
                f"process {number} differs from process 0 in {len(differ)} values:\n"
                + "\n".join(differ[:_SHOWN])
                + "\nGive all processes the same command, code, data and folders."
            )


def agree_on_arrays(name: str, tree: Any) -> None:
    """As `agree` on the bytes of all arrays of `tree`, numpy or local to a process."""
    if count() == 1:
        return
    crc = 0
    for leaf in jax.tree.leaves(tree):
        crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    agree({f"checksum of {name}": crc})


def guard() -> interrupt.Guard:
    """What stops a run at signals, whether or not there are several processes."""
    return interrupt.Guard() if count() == 1 else Guard()


class Guard(interrupt.Guard):
    """Stops all processes after the same step, whichever of them got the signal.

    They tell each other at every eighth check, so a stop takes up to eight steps (or
    evaluation batches, or dispatches) more than with one process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._checks = 0

    def check(self) -> None:
        """Raises `Interrupted` once a signal has come to any process.

        All processes must call it equally often.
        """
        self._checks += 1
        if self._checks % _CHECKS_AN_EXCHANGE:
            return
        if np.any(multihost_utils.process_allgather(np.bool_(self.requested))):
            raise interrupt.Interrupted

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Does nothing: the others would wait for a process that ended in a call."""
        yield


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turns the loss of another process into an error that says so.

    That is on CPU. Elsewhere JAX ends the process itself, see `connect`.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if count() == 1 or "Gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise errors.HostsError(
            f"another process was lost; what it said last tells why. ({reason:.120})\n"
            "The same commands go on from the last checkpoint."
        ) from error


def _gather(text: str) -> list[str]:
    """The texts of all processes in order of their numbers."""
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    padded = np.zeros(-(-int(sizes.max()) // _PAD) * _PAD, np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
    ]
