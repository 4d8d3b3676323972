"""Weights & Biases: https://docs.wandb.ai, the package `wandb`."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lakd_jax.trackers import tracker

PROJECT = "lakd_jax"
# Unsent data stay in the run's directory, where `wandb sync` finds them: a lost network
# must not keep the next run of a command waiting.
_FINISH_SECONDS = 60


class Wandb(tracker.Tracker):
    """Logs to a run of Weights & Biases, which a resumed run continues.

    The id is kept in the run's directory. A record is a row, numbered from 0, with the
    optimiser's step in the column "step", the axis of all charts. Rows that the service
    has are not sent again; offline every start writes all rows anew, since a killed
    process leaves a file without the last ones.

    wandb's environment variables hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...
    """

    package = "wandb"

    def __init__(self):
        self._run: Any = None
        self._row = 0

    def open(
        self, directory: pathlib.Path, about: tracker.About, resume_step: int | None
    ) -> None:
        """Starts or continues the run; needs the network unless it is offline."""
        import wandb

        identity = tracker.recalled(directory, "wandb") or tracker.new_identity()
        tracker.remember(directory, "wandb", identity)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=str((directory / "trackers").absolute()),
            id=identity,
            resume="allow",
            name=about.name,
            group=about.group,
            job_type=about.job,
            config=_nested(about.config),
            allow_val_change=True,  # `trackers` may differ from the start's
            reinit="create_new",  # a run of the user's own is left alone
            settings=wandb.Settings(**_ONLY_METRICS, finish_timeout=_FINISH_SECONDS),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Logs a row, unless the service has it."""
        row, self._row = self._row, self._row + 1
        if row < self._run.step:
            return
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({"step": step, **named}, step=row, commit=True)

    def close(self, failed: bool) -> None:
        """Waits for the upload, but not for long."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


# The console, the command with its paths, the code, packages and the machine stay here.
_ONLY_METRICS = {
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by block, as wandb's keys have no dots."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *blocks, last = name.split(".")
        inner = nested
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[last] = value
    return nested


TRACKERS = {"wandb": Wandb}
