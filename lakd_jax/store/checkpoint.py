"""Checkpoints: Orbax behind one small interface, with a checksum per leaf.

Orbax restores a flipped bit without a word, casts dtypes, and lets an empty folder
hide every good checkpoint. So a manifest lists the leaves of each step; a restore
verifies them, sets damaged steps aside and goes on with the next older one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lakd_jax import errors
from lakd_jax.runtime import hosts
from lakd_jax.store import manifest as manifests
from lakd_jax.store import quiet

PyTree = Any


class Checkpointer:
    """The checkpoints of one directory; a context manager that waits at its end."""

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int,
        notify: Callable[[str], None] | None = None,
    ):
        """Opens `directory` (made if absent) and clears what a killed save left.

        The last `keep` (1 or more) saves stay on disk, one subfolder a step. `notify`
        is told of a damaged one in a line; without it `logging` is.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        ocp = _orbax()
        self._directory = pathlib.Path(directory).absolute()
        self._notify = notify or logging.getLogger(__name__).warning
        self._own: set[int] = set()  # steps this object has saved or restored
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            save_root_metadata=False,
        )
        with self._writing("open"):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: PyTree, *, extra: dict[str, Any]) -> None:
        """Starts to write `state` and returns once it is copied to host memory.

        The caller may donate `state`, a tree of (replicated) arrays and numbers, at
        once. `extra` is anything JSON can hold. A step this object has saved or
        restored is left as it is; one that an abandoned run left is replaced.

        Raises CheckpointWriteError if this save, or the one before it, failed.
        """
        if step in self._own:
            return
        ocp = _orbax()
        # On CPU these are views of the state. Orbax copies them before it returns.
        held = manifests.host_leaves(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(manifests.nest(held)),
            manifest=ocp.args.JsonSave(manifests.describe(step, held, extra)),
        )
        with self._writing(step):
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(step, args=args, force=True)
        self._own.add(step)

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        Damaged ones on the way are renamed to `STEP.broken` and reported.
        `template` is a state, or `jax.ShapeDtypeStruct`s, with the shardings wanted.

        Returns (step, state, extra), or None if nothing was ever saved here.

        Raises:
          WorkdirError: the checkpoint is of another structure; nothing is renamed.
          NoCheckpointError: there are checkpoints but all of them are damaged.
        """
        self.wait()
        damaged, found = {}, None
        for step in reversed(self.steps()):
            try:
                found = restore_step(self._directory, step, template)
                self._own.add(step)
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
        # Looked for on disk: the damaged ones may be from an earlier start.
        if found is None and any(self._directory.glob("*.broken*")):
            raise errors.NoCheckpointError(
                f"{self._directory}: every checkpoint is damaged (see *.broken there)\n"
                "Use another --workdir, or delete the folder to start from scratch."
            )
        return found

    def steps(self) -> list[int]:
        """The steps on disk in ascending order, without a save under way."""
        return list_steps(self._directory)

    def wait(self) -> None:
        """Blocks until the last save is on disk; CheckpointWriteError if it fails."""
        with self._writing("last"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits as `wait` does and ends the writer's threads."""
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
            self._notify(str(failure))  # the error under way matters more

    def _quarantine(self, step: int, reason: str) -> None:
        source = self._directory / str(step)
        target, count = source.with_name(f"{step}.broken"), 2
        while target.exists():
            target = source.with_name(f"{step}.broken-{count}")
            count += 1
        try:
            source.rename(target)
        except OSError as error:
            raise errors.WorkdirError(f"{source}: {reason}; {error}") from error
        self._notify(f"checkpoint {source} is damaged ({reason}): now {target.name}")

    @contextlib.contextmanager
    def _writing(self, step: int | str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises what its layers below raised
            self._own &= set(self.steps())
            raise errors.CheckpointWriteError(
                f"{self._directory}: checkpoint ({step}) not written: {_brief(error)}\n"
                "Is the disk full? Checkpoints that were complete before still are."
            ) from error


def list_steps(directory: str | os.PathLike) -> list[int]:
    """The steps saved in `directory`, ascending; none if it does not exist."""
    folder = pathlib.Path(directory)
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and p.is_dir())


def restore_step(
    directory: str | os.PathLike, step: int | None, template: PyTree
) -> tuple[int, PyTree, dict[str, Any]]:
    """Reads checkpoint `step` (None: the highest) and changes nothing on disk.

    Returns (step, state, extra).

    Raises:
      NoCheckpointError: there is none, or (`DamagedError`) it is damaged.
      WorkdirError: it is of another structure than `template`.
    """
    found = _existing(directory, step)
    manifest = _read_manifest(found)
    manifests.check_structure(manifest, template, str(found))
    held = _read_leaves(found, manifest)
    likes = manifests.named_leaves(template)
    leaves = [manifests.place(held[name], like) for name, like in likes.items()]
    state = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return int(found.name), state, manifest["extra"]


def read_arrays(
    directory: str | os.PathLike, step: int | None
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """Reads as `restore_step`: (step, {"params/stem/kernel": host array}, extra)."""
    found = _existing(directory, step)
    manifest = _read_manifest(found)
    return int(found.name), _read_leaves(found, manifest), manifest["extra"]


def _existing(directory: str | os.PathLike, step: int | None) -> pathlib.Path:
    folder = pathlib.Path(directory).absolute()
    steps = list_steps(folder)
    wanted = max(steps, default=0) if step is None else step
    if wanted not in steps:
        raise errors.NoCheckpointError(f"{folder}: no checkpoint {wanted}, but {steps}")
    return folder / str(wanted)


def _read_manifest(found: pathlib.Path) -> dict[str, Any]:
    manifest = _read_item(found, "manifest", _orbax().args.JsonRestore())
    manifests.check_manifest(manifest, int(found.name))
    return manifest


def _read_leaves(found: pathlib.Path, manifest: dict[str, Any]) -> dict[str, Any]:
    target = manifests.stored_zeros(manifest)
    args = _orbax().args.StandardRestore(manifests.nest(target))
    held = target | manifests.named_leaves(_read_item(found, "state", args))
    manifests.check_leaves(manifest, held)
    return held


def _read_item(found: pathlib.Path, item: str, args: Any) -> Any:
    ocp = _orbax()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(found, args=ocp.args.Composite(**{item: args}))[item]
    except (MemoryError, PermissionError):
        raise  # the fault of this machine, not of the checkpoint
    except Exception as error:
        raise manifests.DamagedError(_brief(error)) from error


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.120}".rstrip(": ")


def _orbax() -> types.ModuleType:
    import orbax.checkpoint  # here, as it takes a second

    quiet.install()
    return orbax.checkpoint
