"""Locks the directory of a run for one process: on a disk, or in a bucket.

On a disk the system releases the lock when the process ends. A bucket has an object
instead, which its owner writes again every `BEAT` seconds; nobody else can meanwhile,
since each write is on condition of the last one's generation. Whoever finds the object
unchanged for `STALE` seconds, or its owner dead on the same machine, takes it over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from lakd_jax import errors, paths
from lakd_jax.store import bucket

FILE = ".lock"
BEAT = 20.0  # seconds between two writes of the owner
STALE = 120.0  # seconds without one after which the owner is taken for dead
_POLL = 2.0
_LOG = logging.getLogger(__name__)
_CLAIMS: set[str] = set()  # that this process holds in buckets


def hold(path: pathlib.Path) -> Callable[[], None]:
    """Locks a directory until the returned function is called, or the process ends.

    Raises:
      errors.WorkdirError: another process has it.
      OSError: the directory cannot be written.
    """
    if paths.is_bucket(path):
        claim = Claim(bucket.Object(path / FILE), str(path))
        claim.acquire()
        return claim.release
    handle = _lock_file(path)
    return functools.partial(os.close, handle)


def require_held(path: pathlib.Path) -> None:
    """Checks that no other process has taken over this one's lock; only for buckets.

    Raises:
      errors.WorkdirError: one has, or the lock was deleted.
      errors.CheckpointWriteError: the bucket cannot be reached.
    """
    if not paths.is_bucket(path):
        return  # the system keeps the lock
    try:
        with bucket.reported(path):
            found = bucket.Object(path / FILE).read()
    except OSError as error:
        raise errors.CheckpointWriteError(f"{error}: nothing is saved") from error
    owner = Owner.parse(found.content) if found else None
    if owner is None or owner.claim not in _CLAIMS:
        gone = f"taken over by {owner}" if owner else f"its {FILE} was deleted"
        raise errors.WorkdirError(
            f"{path}: {gone}, while this process did not answer; it stops without "
            "saving, and the same command continues once the other has ended."
        )


def is_held(path: pathlib.Path) -> bool:
    """Returns whether `require_held` finds no fault."""
    try:
        require_held(path)
    except errors.LakdError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that has a lock.

    Attributes:
      machine: identifies the running system and the processes that it numbers alike.
      began: when the process started, since its number is used again.
      claim: no other has this one.
    """

    host: str = "unknown"
    process: int = 0
    machine: str = ""
    began: str = ""
    claim: str = ""

    @classmethod
    def this(cls) -> Owner:
        """Returns this process as the owner of a new claim."""
        process, host = os.getpid(), socket.gethostname()
        claim = uuid.uuid4().hex
        return cls(host, process, _machine(), _began(process) or "", claim)

    @classmethod
    def parse(cls, content: bytes) -> Owner:
        """Returns the owner that `content` describes, with defaults for what lacks."""
        try:
            values = json.loads(content)
            known = {field.name for field in dataclasses.fields(cls)}
            return cls(**{name: values[name] for name in known & values.keys()})
        except (ValueError, AttributeError):
            return cls()

    def runs(self) -> bool | None:
        """Returns whether it runs and holds its claim; None for another machine's."""
        if not self.machine or self.machine != _machine():
            return None
        if _began(self.process) != self.began:
            return False
        return self.process != os.getpid() or self.claim in _CLAIMS

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Claim:
    """A lock in a bucket, renewed by a thread while it is held."""

    def __init__(self, stored: Any, name: str, beat: float = 0, stale: float = 0):
        """Prepares the lock.

        Args:
          stored: a `bucket.Object`.
          name: of the directory, for messages.
          beat, stale: in place of BEAT and STALE.
        """
        self._object, self._name = stored, name
        self._beat, self._stale = beat or BEAT, stale or STALE
        self._owner, self._count = Owner.this(), 0
        self._generation = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> None:
        """Creates the object, or takes over that of a dead process.

        Raises:
          errors.WorkdirError: its owner lives.
        """
        if not self._write(0):
            self._take_over()
        _CLAIMS.add(self._owner.claim)
        self._thread.start()

    def release(self) -> None:
        """Deletes the object, unless another process has taken it over."""
        self._ended.set()
        self._thread.join(10.0)  # it may wait for an answer
        _CLAIMS.discard(self._owner.claim)
        try:
            self._object.delete(self._generation)
        except Exception as error:  # of any layer; what was done is not in doubt
            _LOG.warning("%s: %s is left there: %s", self._name, FILE, error)

    def _take_over(self) -> None:
        seen, since = None, time.monotonic()
        while True:
            found = self._object.read()
            if found is None:
                if self._write(0):
                    return
                continue
            owner = Owner.parse(found.content)
            runs = owner.runs()
            if runs or seen not in (None, found.generation):
                raise errors.WorkdirError(
                    f"{self._name}: in use by {owner}\n"
                    "Wait for it to finish, or use another --workdir."
                )
            if runs is False or time.monotonic() - since >= self._stale:
                if self._write(found.generation):
                    _LOG.warning("%s: taken over from %s", self._name, owner)
                    return
            elif seen is None:
                _LOG.warning(
                    "%s: was in use by %s; if that does not answer, it is taken over "
                    "in %.0f s",
                    *(self._name, owner, self._stale),
                )
            seen = found.generation
            time.sleep(min(_POLL, self._beat))

    def _write(self, generation: int) -> bool:
        """Writes the object in place of this generation; False if there is another."""
        self._count += 1
        values = dataclasses.asdict(self._owner) | {"renewed": self._count}
        content = json.dumps(values).encode()
        written = self._object.write(content, generation)
        if written is None:
            # An answer may have been lost, and the request sent again.
            found = self._object.read()
            written = found.generation if found and found.content == content else None
        if written is not None:
            self._generation = written
        return written is not None

    def _renew(self) -> None:
        while not self._ended.wait(self._beat):
            # A lost connection: tried again after the next wait.
            with contextlib.suppress(Exception):
                if not self._write(self._generation):
                    return  # `require_held` will report it


def _lock_file(path: pathlib.Path) -> int:
    handle = os.open(path / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError as error:
        holder = os.read(handle, 200).decode(errors="replace") or "another process"
        os.close(handle)
        raise errors.WorkdirError(
            f"{path}: in use by {holder}\n"
            "Wait for it to finish, or use another --workdir."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            os.close(handle)
            raise
        _LOG.warning("%s: the file system has no locks (%s)", path, error)
    return handle


@functools.cache
def _machine() -> str:
    """Identifies the running system and its numbering of processes; "" if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: owners are then taken for those of other machines
        return ""


def _began(process: int) -> str | None:
    """Returns when a process started, in ticks; None if it has ended."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    # After the name, which is in brackets and may hold any others.
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]
