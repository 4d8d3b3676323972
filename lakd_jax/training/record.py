"""One run as the loop sees it: its directory, its record, its best variables."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lakd_jax import errors
from lakd_jax.data import order
from lakd_jax.report import metrics as metrics_lib
from lakd_jax.store import checkpoint, workdir
from lakd_jax.training import evaluate as evaluate_lib
from lakd_jax.training import feeds
from lakd_jax.training import state as state_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is and how often it logs, evaluates and saves, in steps."""

    batch_size: int
    drop_last: bool
    examples: int
    epochs: int
    log_every: int
    eval_every: int
    save_every: int
    steps_per_dispatch: int
    keep: int

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch, the short last batch included if it is kept."""
        return order.steps_per_epoch(self.examples, self.batch_size, self.drop_last)

    @property
    def total_steps(self) -> int:
        """Updates in the whole run."""
        return self.epochs * self.steps_per_epoch


@dataclasses.dataclass
class Progress:
    """What a checkpoint keeps beside the arrays; plain numbers, so it is JSON.

    Attributes:
      window: metrics of each step since the last line in metrics.jsonl.
      evaluated: the step of the last evaluation on minival.
      best_step, best_right: the evaluation with most right answers; the first
        of several equal ones.
      seconds: wall time of the run; `step_seconds`: that of the steps alone.
      images: how many were seen in `step_seconds`.
    """

    window: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluated: int = 0
    best_step: int = 0
    best_right: int = -1
    seconds: float = 0.0
    step_seconds: float = 0.0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """The end of a run: the student's variables, last and best on minival."""

    last: PyTree
    best: PyTree | None
    progress: Progress

    @property
    def images_per_second(self) -> float:
        """Over all steps, compilation, evaluation and saving left out."""
        return self.progress.images / max(self.progress.step_seconds, 1e-9)


class RunRecord:
    """What a run keeps on disk and between steps, for the loop to call."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        seed: int,
        first_state: Callable[[], state_lib.TrainState],
        minival: feeds.Data | None,
        evaluator: evaluate_lib.Evaluator,
    ):
        self.plan, self.directory, self.seed = plan, directory, seed
        self.first_state = first_state
        self.progress = Progress()
        self.saved = 0
        self._minival, self._evaluator = minival, evaluator
        self._best: PyTree = {}
        self._shown = (0, 0.0)
        self._began = time.perf_counter()

    def restore(
        self,
        stack: contextlib.ExitStack,
        state: state_lib.TrainState,
    ) -> tuple[int, state_lib.TrainState]:
        """The newest checkpoint, or (0, `state`) if there is none.

        Args:
          stack: closes the checkpoints' writer.
          state: the first one.
        """
        folder = self.directory / workdir.CHECKPOINTS
        saver = checkpoint.Checkpointer(folder, keep=self.plan.keep)
        self._saver = stack.enter_context(saver)
        if self._minival:
            self._best = jax.device_get(state.variables("student"))
        template = {"train": state.to_tree(), "best": self._best}
        found = self._saver.restore(template)
        if found is None:
            return 0, state
        step, arrays, extra = found
        self._best = arrays["best"]
        self.progress = Progress(**extra)
        self._began -= self.progress.seconds
        self.saved = step
        self._shown = self.progress.images, self.progress.step_seconds
        return step, state_lib.TrainState.from_tree(arrays["train"])

    def begin(self, stack: contextlib.ExitStack, step: int) -> None:
        """Opens metrics.jsonl, without what was written after `step`."""
        self._writer = stack.enter_context(
            metrics_lib.MetricWriter(self.directory, resume_step=step or None)
        )

    def rows(self, step: int, stop: int) -> np.ndarray:
        """Positions (n, B) in the training split for the next dispatch."""
        plan = self.plan
        several = plan.steps_per_dispatch

        def positions(at: int) -> np.ndarray:
            return order.batch_indices(
                self.seed, at, plan.examples, plan.batch_size, plan.drop_last
            )

        if several > 1 and step + several <= stop:
            rows = [positions(step + i) for i in range(several)]
            if len(rows[-1]) == plan.batch_size:
                return np.stack(rows)
        return positions(step)[None]

    def note(self, first: int, metrics: Mapping[str, Any]) -> None:
        """Moves a dispatch's metrics (n,) to the window.

        Raises:
          errors.NonFiniteError: a loss or gradient is NaN or infinite.
        """
        columns = {n: v.tolist() for n, v in metrics.items()}
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            row = dict(zip(columns, values, strict=True))
            bad = [n for n, v in row.items() if not math.isfinite(v)]
            if bad:
                step = first + i + 1
                raise self._not_finite(step - len(self.progress.window), step, bad)
            self.progress.window.append(row)

    def _not_finite(
        self, first: int, step: int, bad: list[str]
    ) -> errors.NonFiniteError:
        """`first`: where the window of metrics began that `step` belongs to."""
        # A term says more than the total it makes non-finite.
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
        """Writes means over the window: (them, images a second since the last)."""
        window, progress = self.progress.window, self.progress
        means = {n: sum(row[n] for row in window) / len(window) for n in window[0]}
        self._writer.write(step, "train", means)
        images, seconds = self._shown  # the speed of late, not of the whole run
        speed = (progress.images - images) / max(progress.step_seconds - seconds, 1e-9)
        self._shown = progress.images, progress.step_seconds
        window.clear()
        return means, speed

    def evaluation_due(self, step: int) -> bool:
        """Whether minival is to be looked at now and has not been."""
        plan = self.plan
        if not self._minival or self.progress.evaluated >= step:
            return False
        due = step % (plan.eval_every * plan.steps_per_epoch) == 0
        return due or step == plan.total_steps

    def evaluate(self, step: int, state: state_lib.TrainState) -> evaluate_lib.Score:
        """Scores the student on minival and keeps it if it is the best so far."""
        assert self._minival  # see `evaluation_due`
        variables = state.variables("student")
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
        """Writes a checkpoint and blocks until it is on disk."""
        self.progress.seconds = time.perf_counter() - self._began
        extra = dataclasses.asdict(self.progress)
        arrays = {"train": state.to_tree(), "best": self._best}
        self._saver.save(step, arrays, extra=extra)
        self._saver.wait()
        self.saved = step

    def trained(self, state: state_lib.TrainState) -> Trained:
        """The end of the run."""
        return Trained(state.variables("student"), self._best or None, self.progress)
