"""Describes a run to the trackers of its metrics."""

from pathlib import Path, PurePath
from typing import Any

from lakd_jax import paths
from lakd_jax.config import resolved
from lakd_jax.data import sources
from lakd_jax.trackers import tracker

TEACHER = "teacher"
_FOLDERS = ("compile_cache", "data.data_dir", "teacher.cache")
_PATHS = ("student.init", "teacher.init")


def about(config: resolved.Config, directory: Path, root: Path | None) -> tracker.About:
    """Returns what trackers are told of a run.

    Args:
      config: of the run.
      directory: of the run.
      root: of the command; seeds and baselines are below it, a teacher elsewhere.
    """
    run, command = paths.absolute(directory), paths.absolute(root or directory)
    below = run.is_relative_to(command)
    parts = (command.name, *run.relative_to(command).parts) if below else (run.name,)
    job = config.method if below else TEACHER
    return tracker.About("/".join(parts), command.name, job, _told(config))


def _told(config: resolved.Config) -> dict[str, Any]:
    """Returns the fields without the folders of this machine.

    Of a path the last part is kept, of a registered data set its name: what follows is
    the user's own, and may be a secret.
    """
    source = config.data.source
    prefix, colon, rest = source.partition(":")
    if sources.is_added(source):
        source = prefix
    elif prefix in ("folder", "npz"):
        source = prefix + colon + PurePath(rest).name
    values = {**config.flat(), "data.source": source}
    values |= {name: PurePath(values[name]).name for name in _PATHS}
    return {name: value for name, value in values.items() if name not in _FOLDERS}
