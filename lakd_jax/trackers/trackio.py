"""Trackio: a local dashboard, the package `trackio`."""

import contextlib
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from lakd_jax.trackers import tracker

PROJECT = "lakd_jax"


class Trackio(tracker.Tracker):
    """Logs to Trackio's database on this machine; `trackio show` opens the dashboard.

    Trackio writes every half second, which a killed process loses, so a resumed run
    logs all records to a new run of Trackio, and removes the one before.

    Trackio's environment variables hold: TRACKIO_DIR, TRACKIO_SPACE_ID, ... On a Space
    or a server, runs of earlier starts are kept.
    """

    package = "trackio"

    def __init__(self):
        self._run: Any = None

    def open(
        self, directory: pathlib.Path, about: tracker.About, resume_step: int | None
    ) -> None:
        """Starts a new run in place of that of an earlier start."""
        import trackio

        _remove(tracker.recalled(directory, "trackio"))
        with contextlib.redirect_stdout(sys.stderr):  # it prints how to see the run
            self._run = trackio.init(
                project=PROJECT,
                name=about.name,
                group=about.group,
                config={**about.config, "job": about.job},
                resume="never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        tracker.remember(directory, "trackio", self._run.id)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Logs scalars with the names "kind/name"."""
        self._run.log({f"{kind}/{n}": v for n, v in values.items()}, step=step)

    def close(self, failed: bool) -> None:
        """Waits until everything is written."""
        if self._run is not None:
            with contextlib.redirect_stdout(sys.stderr):
                self._run.finish()


def _remove(identity: str) -> None:
    """Removes the run of this id, if the database has it."""
    import trackio

    try:
        runs = list(trackio.Api().runs(PROJECT)) if identity else []
    except ValueError:  # nothing was written before the process was killed
        return
    for run in runs:
        if run.id == identity:
            run.delete()


TRACKERS = {"trackio": Trackio}
