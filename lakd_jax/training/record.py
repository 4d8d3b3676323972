"""Keeps what a run saves: its progress, metrics, checkpoints and best variables."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lakd_jax import errors, paths, trackers
from lakd_jax.data import order
from lakd_jax.report import metrics as metrics_lib
from lakd_jax.runtime import hosts
from lakd_jax.store import checkpoint, workdir
from lakd_jax.trackers import tracker as tracker_lib
from lakd_jax.training import evaluate as evaluate_lib
from lakd_jax.training import feeds
from lakd_jax.training import state as state_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of a run, and how often it logs, evaluates and saves.

    With `fills`, the short last batch of an epoch is filled up, see `StepSpec`.
    """

    batch_size: int
    drop_last: bool
    examples: int
    epochs: int
    log_every: int
    eval_every: int
    save_every: int
    steps_per_dispatch: int
    keep: int
    fills: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Returns the updates per epoch, including a short last batch if it is kept."""
        return order.steps_per_epoch(self.examples, self.batch_size, self.drop_last)

    @property
    def total_steps(self) -> int:
        """Returns the number of updates in the run."""
        return self.epochs * self.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Tracked:
    """The trackers of a run by name, and what they are told of it."""

    trackers: tuple[str, ...] = trackers.DEFAULT
    about: tracker_lib.About = tracker_lib.About()


@dataclasses.dataclass
class Progress:
    """The part of a checkpoint that is stored as JSON, next to the arrays.

    Attributes:
      window: the metrics of each step since the last line in metrics.jsonl.
      evaluated: the step of the last evaluation on minival.
      best_step, best_right: the step and the number of correct predictions of the best
        evaluation, the first one in a tie.
      seconds: the wall time of the run.
      images: the number of images of all steps.
      step_seconds: the wall time of steps, without those that waited for a compiler.
      timed_images: the number of images processed in `step_seconds`.
    """

    window: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluated: int = 0
    best_step: int = 0
    best_right: int = -1
    seconds: float = 0.0
    images: int = 0
    step_seconds: float = 0.0
    timed_images: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a run: the student's variables, last and best on minival.

    `average` is their moving average if there is one that is not `last` itself.
    """

    last: PyTree
    best: PyTree | None
    progress: Progress
    average: PyTree | None = None

    @property
    def images_per_second(self) -> float | None:
        """Returns the mean speed, excluding compilation, evaluation and saving.

        None if every step was part of a dispatch that was compiled.
        """
        if not self.progress.timed_images:
            return None
        return self.progress.timed_images / max(self.progress.step_seconds, 1e-9)


class RunRecord:
    """Keeps a run's progress between steps and on disk, for the training loop."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        seed: int,
        first_state: Callable[[], state_lib.TrainState],
        minival: feeds.Data | None,
        evaluator: evaluate_lib.Evaluator,
        *,
        average_used: bool = False,
        tracked: Tracked | None = None,
        scales: Callable[[state_lib.TrainState], Mapping[str, float]] | None = None,
    ):
        """Creates the record.

        Args:
          average_used: whether the student is its moving average.
          tracked: the trackers.
          scales: returns what metrics are divided by, given the first state.
        """
        self._tracked = tracked or Tracked()
        self._average_used = average_used
        self.plan, self.directory, self.seed = plan, directory, seed
        self.first_state = first_state
        self.progress = Progress()
        self.saved = 0
        self._minival, self._evaluator = minival, evaluator
        self._scales_of = scales
        self._scales: Mapping[str, float] = {}
        self._best: PyTree = {}
        self._flushed = (0, 0.0)
        self._began = time.perf_counter()

    def restore(
        self,
        stack: contextlib.ExitStack,
        state: state_lib.TrainState,
    ) -> tuple[int, state_lib.TrainState]:
        """Returns the step and state of the newest checkpoint.

        Args:
          stack: closes the checkpoint writer.
          state: the first state, returned with step 0 if there is no checkpoint.
        """
        if self._scales_of:
            self._scales = self._scales_of(state)
        folder = self.directory / workdir.CHECKPOINTS
        saver = checkpoint.Checkpointer(folder, keep=self.plan.keep)
        self._saver = stack.enter_context(saver)
        if self._minival:
            self._best = jax.device_get(self._student(state))
        template = {"train": state.to_tree(), "best": self._best}
        restored = self._saver.restore(template)
        if restored is None:
            return 0, state
        step, arrays, extra = restored
        self._best = arrays["best"]
        self.progress = Progress(**extra)
        self._began -= self.progress.seconds
        self.saved = step
        self._flushed = self.progress.timed_images, self.progress.step_seconds
        return step, state_lib.TrainState.from_tree(arrays["train"])

    def begin(self, stack: contextlib.ExitStack, step: int) -> None:
        """Opens metrics.jsonl, dropping lines written after `step`, and trackers."""
        self._writer = stack.enter_context(
            metrics_lib.MetricWriter(
                self.directory,
                resume_step=step or None,
                trackers=self._tracked.trackers,
                about=self._tracked.about,
            )
        )

    def alike(self, step: int, stop: int) -> int:
        """Returns how many batches from `step` on, before `stop`, are of one size.

        `stop` is not beyond the end of the epoch, whose last batch may be short.
        """
        plan = self.plan
        short = plan.examples % plan.batch_size and not plan.drop_last
        short = short and not plan.fills
        ends = stop % plan.steps_per_epoch == 0
        return max(stop - step - (1 if short and ends else 0), 1)

    def rows(self, step: int, count: int) -> np.ndarray:
        """Returns the positions (count, B) in the training split for steps from `step`.

        Their batches must be of one size, see `alike`.
        """
        plan = self.plan
        data = (plan.examples, plan.batch_size, plan.drop_last)
        steps = range(step, step + count)
        rows = [order.batch_indices(self.seed, at, *data) for at in steps]
        if plan.fills:
            rows = [order.filled(row, plan.batch_size) for row in rows]
        return np.stack(rows)

    def note(self, first: int, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics (n,) of a dispatch to the window.

        Raises:
          errors.NonFiniteError: a loss or gradient is NaN or infinite.
        """
        columns = {n: v.tolist() for n, v in metrics.items()}
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            row = dict(zip(columns, values, strict=True))
            row |= {n: row[n] / scale for n, scale in self._scales.items()}
            bad = [n for n, v in row.items() if not math.isfinite(v)]
            if bad:
                step = first + i + 1
                raise self._not_finite(step - len(self.progress.window), step, bad)
            self.progress.window.append(row)

    def _not_finite(
        self, first: int, step: int, bad: list[str]
    ) -> errors.NonFiniteError:
        """Returns the error for `step`, whose window of metrics began at `first`."""
        # A term is more informative than the total that it makes non-finite.
        bad.sort(key=lambda name: ("norm" in name, "/" not in name))
        good = f"step {self.saved}" if self.saved else "none yet"
        return errors.NonFiniteError(
            f"step {step} (window of steps {first} to {step}): {', '.join(bad[:4])} "
            f"not finite.\n"
            f"Last good checkpoint: {good}, in {self.directory}.\n"
            "Try a lower optim.lr, optim.warmup_epochs, or optim.clip_norm, in a new "
            "--workdir."
        )

    def flush(self, step: int) -> tuple[dict[str, float], float]:
        """Writes the means over the window, and returns (means, images per second)."""
        window, progress = self.progress.window, self.progress
        means = {n: sum(row[n] for row in window) / len(window) for n in window[0]}
        self._writer.write(step, "train", means)
        images, seconds = self._flushed  # the speed since the last flush
        images, seconds = (
            progress.timed_images - images,
            progress.step_seconds - seconds,
        )
        speed = images / max(seconds, 1e-9)
        self._flushed = progress.timed_images, progress.step_seconds
        window.clear()
        return means, speed

    def evaluation_due(self, step: int) -> bool:
        """Returns whether an evaluation on minival is due and not yet done."""
        plan = self.plan
        if not self._minival or self.progress.evaluated >= step:
            return False
        due = step % (plan.eval_every * plan.steps_per_epoch) == 0
        return due or step == plan.total_steps

    def evaluate(self, step: int, state: state_lib.TrainState) -> evaluate_lib.Score:
        """Scores the student on minival and keeps its variables if they are best."""
        assert self._minival  # otherwise none is due, see `evaluation_due`
        variables = self._student(state)
        score = self._evaluator(variables, self._minival, step - 1)
        epoch = step / self.plan.steps_per_epoch
        values = {"epoch": epoch, "accuracy": score.accuracy, "loss": score.loss}
        self._writer.write(step, "eval", values)
        self.progress.evaluated = step
        if score.right > self.progress.best_right:
            self.progress.best_right, self.progress.best_step = score.right, step
            self._best = jax.device_get(variables)
        return score

    def save(self, step: int, state: state_lib.TrainState) -> None:
        """Writes a checkpoint and blocks until it is on disk.

        In a bucket, metrics are written before, and another owner of the run is found.
        """
        self.progress.seconds = time.perf_counter() - self._began
        extra = dataclasses.asdict(self.progress)
        arrays = {"train": state.to_tree(), "best": self._best}
        if paths.is_bucket(self.directory):
            hosts.first(self._writer.save)
        self._saver.save(step, arrays, extra=extra)
        self._saver.wait()
        self.saved = step

    def trained(self, state: state_lib.TrainState) -> Trained:
        """Returns the result of the run."""
        average = None
        if state.average and not self._average_used:
            average = state.average_variables()
        return Trained(self._student(state), self._best or None, self.progress, average)

    def _student(self, state: state_lib.TrainState) -> PyTree:
        """Returns the variables that are evaluated and exported."""
        if self._average_used:
            return state.average_variables()
        return state.variables("student")
