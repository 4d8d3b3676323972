"""Checkpoints: Orbax behind one small interface, with a checksum per leaf.

Orbax restores a flipped bit silently, casts dtypes, and ignores every good checkpoint
if there is a newer empty folder. Therefore a manifest lists the leaves of each step; a
restore verifies them, renames damaged steps and continues with the next older one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lakd_jax import errors, paths
from lakd_jax.runtime import hosts
from lakd_jax.store import bucket, quiet
from lakd_jax.store import manifest as manifests

PyTree = Any
_LOG = logging.getLogger(__name__)
# What TensorStore calls failures of a bucket that say nothing about the data.
_UNREACHED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED")
_UNREACHED += ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED")


class Checkpointer:
    """The checkpoints of one directory; a context manager that waits for saves."""

    def __init__(self, directory: str | os.PathLike, *, keep: int):
        """Opens `directory` (created if absent) and removes remains of a killed save.

        The last `keep` (1 or more) saves remain on disk, one subfolder per step.
        Damaged ones are reported to `logging`, in one line.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        ocp = _orbax()
        self._directory = paths.absolute(paths.of(directory))
        self._current_steps: set[int] = set()  # saved or restored by this object
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            save_root_metadata=False,
        )
        with self._writing("open"):
            bucket.make_folder(self._directory)
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: PyTree, *, extra: dict[str, Any]) -> None:
        """Starts writing `state` and returns once it is copied to host memory.

        `state`, a tree of (replicated) arrays and numbers, may be donated afterwards.
        `extra` must be JSON-serialisable. A step that this object has saved or restored
        is not written again; one left by an abandoned run is replaced.

        Raises CheckpointWriteError if this save, or the one before it, failed.
        """
        if step in self._current_steps:
            return
        ocp = _orbax()
        # On CPU these are views of the state. Orbax copies them before it returns.
        leaves = manifests.host_leaves(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(manifests.nest(leaves)),
            manifest=ocp.args.JsonSave(manifests.describe(step, leaves, extra)),
        )
        with self._writing(step):
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(step, args=args, force=True)
        self._current_steps.add(step)

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Restores the newest intact checkpoint.

        Damaged newer ones are renamed to `STEP.broken` and reported. `template` is a
        state with the structure and the shardings of the result.

        Returns (step, state, extra), or None if nothing was ever saved here.

        Raises:
          WorkdirError: the checkpoint has another structure; nothing is renamed.
          NoCheckpointError: there are checkpoints but all of them are damaged.
        """
        self.wait()
        damaged, found = {}, None
        for step in reversed(self.steps()):
            try:
                found = restore_step(self._directory, step, template)
                self._current_steps.add(step)
                break
            except manifests.DamagedError as error:
                damaged[step] = str(error)
        hosts.agree({f"step restored from {self._directory}": found and found[0]})
        sync = _orbax().multihost.sync_global_processes
        sync("all hosts have read")
        if jax.process_index() == 0:
            for step, reason in damaged.items():
                self._quarantine(step, reason)
        sync("damaged ones are renamed")
        self._manager.reload()
        # Checked on disk, since the run may have been restarted after the damage.
        if found is None and any(self._directory.glob("*.broken*")):
            raise errors.NoCheckpointError(
                f"{self._directory}: every checkpoint is damaged (see *.broken there)\n"
                "Use another --workdir, or delete the folder to start from scratch."
            )
        return found

    def steps(self) -> list[int]:
        """Returns the steps on disk in ascending order, without a save in progress."""
        return list_steps(self._directory)

    def wait(self) -> None:
        """Blocks until the last save is on disk; CheckpointWriteError if it failed."""
        with self._writing("last"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits as `wait` does and stops the writer's threads."""
        with self._writing("last"):
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        try:
            self.close()
        except errors.CheckpointWriteError as failure:
            if error is None:
                raise
            _LOG.warning("%s", failure)  # the error being raised is more important

    def _quarantine(self, step: int, reason: str) -> None:
        source = self._directory / str(step)
        target, count = source.with_name(f"{step}.broken"), 2
        while target.exists():
            target = source.with_name(f"{step}.broken-{count}")
            count += 1
        try:
            _rename(source, target)
        except OSError as error:
            raise errors.WorkdirError(f"{source}: {reason}; {error}") from error
        _LOG.warning(
            "checkpoint %s is damaged (%s): now %s", source, reason, target.name
        )

    @contextlib.contextmanager
    def _writing(self, step: int | str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on any exception of lower layers
            self._current_steps &= set(self.steps())
            raise errors.CheckpointWriteError(
                f"{self._directory}: checkpoint ({step}) not written: {_brief(error)}\n"
                "Is the disk full? Checkpoints that were complete before are intact."
            ) from error


def list_steps(directory: str | os.PathLike) -> list[int]:
    """Returns the steps saved in `directory`, ascending; [] if it does not exist."""
    folder = paths.of(directory)
    if paths.is_bucket(folder):
        return bucket.committed(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdecimal() and p.is_dir())


def restore_step(
    directory: str | os.PathLike, step: int, template: PyTree
) -> tuple[int, PyTree, dict[str, Any]]:
    """Reads checkpoint `step` without changing anything on disk.

    Returns (step, state, extra).

    Raises:
      NoCheckpointError: it does not exist, or (`DamagedError`) is damaged.
      WorkdirError: its structure differs from that of `template`.
    """
    folder = _step_folder(directory, step)
    manifest = _read_manifest(folder)
    manifests.check_structure(manifest, template, str(folder))
    stored = _read_leaves(folder, manifest)
    targets = manifests.named_leaves(template)
    leaves = [manifests.place(stored[name], like) for name, like in targets.items()]
    state = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return int(folder.name), state, manifest["extra"]


def read_arrays(
    directory: str | os.PathLike, step: int | None
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """Reads (step, {"params/stem/kernel": host array}, extra), as `restore_step`.

    `step` None reads the newest checkpoint.
    """
    folder = _step_folder(directory, step)
    manifest = _read_manifest(folder)
    return int(folder.name), _read_leaves(folder, manifest), manifest["extra"]


def _step_folder(directory: str | os.PathLike, step: int | None) -> pathlib.Path:
    folder = paths.absolute(paths.of(directory))
    steps = list_steps(folder)
    step = max(steps, default=0) if step is None else step
    if step not in steps:
        raise errors.NoCheckpointError(f"{folder}: no checkpoint {step}, but {steps}")
    return folder / str(step)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    manifest = _read_item(folder, "manifest", _orbax().args.JsonRestore())
    manifests.check_manifest(manifest, int(folder.name))
    return manifest


def _read_leaves(folder: pathlib.Path, manifest: dict[str, Any]) -> dict[str, Any]:
    target = manifests.stored_zeros(manifest)
    args = _orbax().args.StandardRestore(manifests.nest(target))
    leaves = target | manifests.named_leaves(_read_item(folder, "state", args))
    manifests.check_leaves(manifest, leaves)
    return leaves


def _read_item(folder: pathlib.Path, item: str, args: Any) -> Any:
    ocp = _orbax()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            composite = ocp.args.Composite(**{item: args})
            return reader.restore(folder, args=composite)[item]
    except (MemoryError, PermissionError):
        raise  # a fault of this machine, not of the checkpoint
    except Exception as error:
        _require_answer(folder, error)
        raise manifests.DamagedError(_brief(error)) from error


def _require_answer(folder: pathlib.Path, error: Exception) -> None:
    """Raises if reading failed because a bucket cannot be reached."""
    if not paths.is_bucket(folder):
        return
    try:
        with bucket.reported(folder):
            committed = (folder / bucket.COMMITTED).exists()
    except OSError as unreachable:
        raise errors.WorkdirError(f"cannot be read: {unreachable}") from error
    if committed and any(word in str(error) for word in _UNREACHED):
        raise errors.WorkdirError(f"{folder}: cannot be read: {_brief(error)}")


def _rename(source: pathlib.Path, target: pathlib.Path) -> None:
    if paths.is_bucket(source):
        bucket.move_folder(source, target)
    else:
        source.rename(target)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.120}".rstrip(": ")


def _orbax() -> types.ModuleType:
    import orbax.checkpoint  # imported on demand, since it takes a second

    quiet.install()
    return orbax.checkpoint
