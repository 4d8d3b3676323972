"""The directory of a run: one run at a time, and one configuration.

`prepare` checks that the directory is writable, locks it, and records the configuration
(`config.json`) and the environment (`environment.json`) before the first step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from lakd_jax import errors, paths, version
from lakd_jax.runtime import hosts
from lakd_jax.store import bucket, locks

# The files of a run's directory.
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
TEACHER = "teacher.json"  # identifies the teacher's weights
CHECKPOINTS = "checkpoints"
RESULT = "result.json"  # only in finished runs, like the student
STUDENT = "student.safetensors"
BEST = "student_best.safetensors"  # of the epoch that was best on minival
AVERAGE = "student_average.safetensors"  # only with optim.ema and not optim.ema_used
TABLE = "table.md"
STAGE1 = "stage1"  # the first training of an HME
_SHOWN = 8
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass
class Workdir:
    """A prepared directory, locked until `close` or the end of the process."""

    path: pathlib.Path
    resumed: bool
    release: Callable[[], None] | None

    def close(self) -> None:
        """Releases the lock."""
        release, self.release = self.release, None
        if release:
            release()

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepare(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    may_change: Collection[str] = (),
    folder: pathlib.Path = pathlib.Path(),
) -> Workdir:
    """Creates, checks and locks the directory of a run, before step 1.

    With several processes the first one does this, and all must see the same directory.

    Args:
      workdir: local path, created if absent, or a folder of a bucket.
      config: the resolved configuration, nested, JSON-serialisable.
      may_change: dotted fields in which the existing run may differ from `config`.
      folder: where the relative paths of `config` start; by default the current folder.

    Returns:
      The directory; its `resumed` is True if it already had a run.

    Raises:
      ConfigError: `workdir` is neither a local path nor a folder of a bucket.
      WorkdirError: it cannot be written, is in use, or has a run of another
        configuration or another version of lakd_jax.
      HostsError: it is not the same directory for all processes.
    """
    path = paths.absolute(paths.place(workdir, "--workdir"))
    prepared = Workdir(path, resumed=False, release=None)

    def claim() -> bool:
        prepared.release, resumed = _claim(path, config, may_change, folder)
        return resumed

    prepared.resumed = hosts.first(claim)
    try:
        hosts.agree({f"{path / CONFIG} exists": (path / CONFIG).exists()})
    except BaseException:
        prepared.close()
        raise
    return prepared


def _claim(
    path: pathlib.Path,
    config: Mapping[str, Any],
    may_change: Collection[str],
    folder: pathlib.Path,
) -> tuple[Callable[[], None], bool]:
    """Locks the directory; returns what releases it, and whether it already had a run.

    See `prepare`.
    """
    with contextlib.ExitStack() as undo:
        try:
            with bucket.reported(path):
                bucket.make_folder(path)
                _check_writable(path)
                release = locks.hold(path)
                undo.callback(release)
                resumed = _check_config(path, config, may_change)
                _record(path, config, resumed, folder)
        except OSError as error:
            raise errors.WorkdirError(
                f"{path}: cannot be written: {error.strerror or error}\n"
                "Free space or change permissions there, or use another --workdir."
            ) from error
        undo.pop_all()
    return release, resumed


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; raises OSError if unreadable, ValueError if it is not JSON."""
    place = paths.of(path)
    with bucket.reported(place):
        text = place.read_text(encoding="utf-8")
    return json.loads(text)


def settings(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the configuration of a finished run, as stored.

    Raises:
      errors.ExportError: there is no run, or it has not finished.
    """
    if not (directory / CONFIG).exists():
        raise errors.ExportError(
            f"{directory}: is not a run (it has no {CONFIG}); set --workdir to the "
            "directory of a finished run."
        )
    if not (directory / RESULT).exists():
        raise errors.ExportError(
            f"{directory}: has not finished (it has no {RESULT}); finish it by running "
            f"its command again, then repeat this one.{seeds_hint(directory)}"
        )
    try:
        return read_json(directory / CONFIG)
    except ValueError as error:
        raise errors.ExportError(
            f"{directory / CONFIG}: not readable: {error}"
        ) from error


def folder(directory: pathlib.Path) -> pathlib.Path:
    """Returns where the relative paths in the record of a run start.

    This is the folder in which the run was started. `pathlib.Path()`, which stands for
    the current one, is returned if that is the same, if it was not recorded, or if it
    no longer exists: then the project was moved, as a whole.
    """
    try:
        found = pathlib.Path(read_json(directory / ENVIRONMENT)["folder"])
    except (FileNotFoundError, ValueError, KeyError):
        return pathlib.Path()
    return found if found.is_dir() and found != pathlib.Path.cwd() else pathlib.Path()


def seeds_hint(directory: pathlib.Path) -> str:
    """Returns a line that names one of the seeds in `directory`; "" without seeds."""
    found = sorted(directory.glob(f"seed*/{RESULT}"))
    return f"\nIt holds seeds; name one, such as {found[0].parent}" if found else ""


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes | memoryview) -> None:
    """Writes a file atomically: readers, or a crash, see the old or the new content."""
    path = paths.of(path)
    if paths.is_bucket(path):
        return bucket.write(path, data)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def environment(folder: pathlib.Path = pathlib.Path()) -> dict[str, Any]:
    """Describes the environment: versions, commit, devices, command and start time.

    `folder` is where the relative paths of the command start.
    """
    return {
        **code(),
        "devices": [f"{d.id}: {d.platform} {d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": shlex.join(sys.orig_argv),
        "folder": str(folder.absolute()),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def code() -> dict[str, Any]:
    """Describes the program: versions and commit, a part of `environment`."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    versions |= {"python": platform.python_version(), "lakd_jax": version.VERSION}
    return {"versions": versions, "commit": _commit()}


def _check_writable(path: pathlib.Path) -> None:
    if paths.is_bucket(path):
        return bucket.require_writable(path)
    # Writes a megabyte, since a nearly full disk still accepts a few bytes.
    probe = path / ".write_test"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _check_config(
    path: pathlib.Path, config: Mapping[str, Any], may_change: Collection[str]
) -> bool:
    """Returns whether the directory has a run that may be resumed with `config`."""
    if not (path / CONFIG).exists():
        if (path / CHECKPOINTS).exists():
            raise errors.WorkdirError(f"{path}: has checkpoints but no {CONFIG}")
        return False
    try:
        old = _flat(read_json(path / CONFIG))
    except ValueError as error:
        raise errors.WorkdirError(f"{path / CONFIG}: not readable: {error}") from error
    _require_version(path)
    new = _flat(json.loads(json.dumps(config)))
    changed = _changes(old, new, may_change)
    if changed:
        more = f" (first {_SHOWN} shown)" if len(changed) > _SHOWN else ""
        raise errors.WorkdirError(
            f"{path}: has another config, {len(changed)} fields differ{more}:\n"
            + "\n".join(changed[:_SHOWN])
            + "\nUse another --workdir, or set these fields to their old values."
        )
    return True


def _recorded(path: pathlib.Path) -> dict[str, Any]:
    """Returns the environment in which the run was started; {} if it is lost."""
    try:
        return read_json(path / ENVIRONMENT)
    except (FileNotFoundError, ValueError):
        return {}


def _require_version(path: pathlib.Path) -> None:
    """Raises WorkdirError if the run was started by another version of lakd_jax."""
    then = _recorded(path).get("versions", {}).get("lakd_jax", version.VERSION)
    if then != version.VERSION:
        raise errors.WorkdirError(
            f"{path}: was started by lakd_jax {then}, this is {version.VERSION}: "
            f"install lakd_jax {then} to resume it, or use another --workdir."
        )


def _record(
    path: pathlib.Path, config: Mapping[str, Any], resumed: bool, folder: pathlib.Path
) -> None:
    now = environment(folder)
    then = _recorded(path) if resumed else {}
    if then:
        for change in _changes(_flat(then), _flat(now), ()):
            if change.strip().startswith(("versions.", "devices:", "processes:")):
                logging.getLogger(__name__).warning(
                    "changed since the start:%s", change
                )
    else:
        write_json(path / ENVIRONMENT, now)
    # Written last: its presence marks the directory as complete.
    write_json(path / CONFIG, config)


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], skip: Collection[str]
) -> list[str]:
    # Compared as text, since NaN is not equal to itself.
    pairs = {
        field: tuple(
            json.dumps(x[field]) if field in x else "absent" for x in (old, new)
        )
        for field in sorted((old.keys() | new.keys()) - set(skip))
    }
    return [f"  {k}: {a:.60} -> {b:.60}" for k, (a, b) in pairs.items() if a != b]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _commit() -> str | None:
    """Returns the commit of the checkout of this code, or None outside of one.

    "-dirty" is appended if the checkout is modified.
    """
    source = pathlib.Path(__file__)
    # An installed package may be inside the checkout of another project.
    commands = (
        f"git ls-files --error-unmatch {source.name}",
        "git describe --always --dirty --abbrev=40 --exclude=*",
    )
    output = ""
    for command in commands:
        try:
            output = subprocess.run(
                command.split(),
                cwd=source.parent,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    return output
