"""The training loop of one network: steps, metrics, evaluation, checkpoints.

Everything about a step follows from (config, step), and what is carried between
steps is in the checkpoint, so a run that was stopped ends as one that was not.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lakd_jax import checkpoint, errors, interrupt
from lakd_jax.data import order
from lakd_jax.report import metrics as metrics_lib
from lakd_jax.report import progress as progress_lib
from lakd_jax.train import engines, evaluate, modules
from lakd_jax.train import learner as learner_lib
from lakd_jax.train import state as state_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long, how often, and where; durations in steps."""

    workdir: Path
    seed: int
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
class Ledger:
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
    ledger: Ledger

    @property
    def images_per_second(self) -> float:
        """Over all steps, compilation, evaluation and saving left out."""
        return self.ledger.images / max(self.ledger.step_seconds, 1e-9)


class Fit:
    """One run of a learner on resident data; `run` does all of it."""

    def __init__(
        self,
        plan: Plan,
        learner: learner_lib.Learner,
        first_state: Callable[[], state_lib.TrainState],
        engine: engines.Engine,
        minival: state_lib.Resident | None,
        evaluator: evaluate.Evaluator,
        guard: interrupt.Guard,
    ):
        self.plan, self._learner = plan, learner
        self._engine, self._minival = engine, minival
        self._evaluator, self._guard = evaluator, guard
        self._first_state = first_state
        self._ledger = Ledger()
        self._best: PyTree = {}
        self._saved = 0
        self._shown = (0, 0.0)
        self._began = time.perf_counter()

    def run(self) -> Trained:
        """Trains from the newest checkpoint, or from the start, to the end.

        Raises:
          interrupt.Interrupted: stopped by a signal; the last step is saved.
          errors.NonFiniteError: a loss or gradient is NaN or infinite.
          errors.CheckpointWriteError, errors.NoCheckpointError: see there.
        """
        plan = self.plan
        with contextlib.ExitStack() as stack:
            self._saver = stack.enter_context(
                checkpoint.Checkpointer(plan.workdir / "checkpoints", keep=plan.keep)
            )
            start = self._restore()
            self._writer = stack.enter_context(
                metrics_lib.MetricWriter(plan.workdir, resume_step=start or None)
            )
            self._screen = stack.enter_context(
                progress_lib.Progress(plan.total_steps, plan.steps_per_epoch)
            )
            if start:
                self._screen.note(f"resumed at step {start} of {plan.total_steps}")
            try:
                self._loop(start)
            except interrupt.Interrupted:
                self._save(self._step)
                raise
        best = self._best or None
        return Trained(student_variables(self._engine.state()), best, self._ledger)

    def one_step(self) -> tuple[state_lib.TrainState, dict[str, float], engines.Costs]:
        """The first step alone: (state, its metrics, its costs)."""
        self._engine.load(self._first_state())
        told = jax.device_get(self._engine.run(self._rows(0, 1)))
        metrics = {n: float(v[0]) for n, v in modules.together(told).items()}
        return self._engine.state(), metrics, self._engine.costs()

    def temperature(self, step: int) -> jax.Array | None:
        """Of the student's soft gates in its last step, if `step` are made."""
        return self._learner.temperature(step - 1)

    # ------------------------------------------------------------ the loop

    def _loop(self, step: int) -> None:
        total = self.plan.total_steps
        if step:
            self._at_boundary(step)  # what a stop may have left undone
        while step < total:
            step = self._advance(step, self._next_boundary(step))
            self._at_boundary(step)

    def _advance(self, step: int, stop: int) -> int:
        """Dispatches the steps up to `stop` and reads their metrics."""
        unread: tuple[int, Any] | None = None
        try:
            while step < stop:
                rows = self._rows(step, stop)
                began = time.perf_counter()
                metrics = self._engine.run(rows)
                self._step = step + rows.shape[0]
                # The device works on this dispatch while the last one is read.
                previous, unread = unread, (step, metrics)
                step = self._step
                if previous:
                    self._read(*previous)
                self._ledger.images += rows.size
                self._ledger.step_seconds += time.perf_counter() - began
                self._guard.check()
        except interrupt.Interrupted:
            if unread:
                self._read(*unread)
            raise
        if unread:
            began = time.perf_counter()
            self._read(*unread)
            self._ledger.step_seconds += time.perf_counter() - began
        return step

    def _at_boundary(self, step: int) -> None:
        """Metrics, evaluation, checkpoint, in this order: a stop loses none."""
        plan = self.plan
        epoch_end = step % plan.steps_per_epoch == 0
        if self._ledger.window and (epoch_end or step % plan.log_every == 0):
            self._flush(step)
        last = step == plan.total_steps
        due = step % (plan.eval_every * plan.steps_per_epoch) == 0
        if self._minival and self._ledger.evaluated < step and (due or last):
            self._evaluate(step, self._minival)
        if step % plan.save_every == 0 or last:
            self._save(step)

    def _next_boundary(self, step: int) -> int:
        plan = self.plan
        every = (plan.log_every, plan.steps_per_epoch, plan.save_every)
        return min(plan.total_steps, *((step // n + 1) * n for n in every))

    # ------------------------------------------------------------ its parts

    def _rows(self, step: int, stop: int) -> np.ndarray:
        """Positions (n, B) in the training split for the next dispatch."""
        plan = self.plan
        several = plan.steps_per_dispatch

        def positions(at: int) -> np.ndarray:
            return order.batch_indices(
                plan.seed, at, plan.examples, plan.batch_size, plan.drop_last
            )

        if several > 1 and step + several <= stop:
            rows = [positions(step + i) for i in range(several)]
            if len(rows[-1]) == plan.batch_size:
                return np.stack(rows)
        return positions(step)[None]

    def _read(self, first: int, told: Sequence[learner_lib.Metrics]) -> None:
        """Moves a dispatch's metrics to the window; stops if one is not finite."""
        metrics = modules.together(jax.device_get(told))
        columns = {n: v.tolist() for n, v in metrics.items()}
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            row = dict(zip(columns, values, strict=True))
            bad = [n for n, v in row.items() if not math.isfinite(v)]
            if bad:
                step = first + i + 1
                raise self._not_finite(step - len(self._ledger.window), step, bad)
            self._ledger.window.append(row)

    def _not_finite(
        self, first: int, step: int, bad: list[str]
    ) -> errors.NonFiniteError:
        """`first`: where the window of metrics began that `step` belongs to."""
        # A term says more than the total it makes non-finite.
        bad.sort(key=lambda name: ("norm" in name, "/" not in name))
        good = f"step {self._saved}" if self._saved else "none yet"
        return errors.NonFiniteError(
            f"step {step} (window of steps {first} to {step}): {', '.join(bad[:4])} "
            f"not finite.\n"
            f"Last good checkpoint: {good}, in {self.plan.workdir}.\n"
            "Try a lower optim.lr, optim.warmup_epochs, or optim.clip_norm, in a new "
            "--workdir."
        )

    def _flush(self, step: int) -> None:
        """One line of metrics: means over the window."""
        window, ledger = self._ledger.window, self._ledger
        means = {n: sum(row[n] for row in window) / len(window) for n in window[0]}
        self._writer.write(step, "train", means)
        images, seconds = self._shown  # the speed of late, not of the whole run
        speed = (ledger.images - images) / max(ledger.step_seconds - seconds, 1e-9)
        self._shown = ledger.images, ledger.step_seconds
        # All are in metrics.jsonl; the line has room for few, the head's first.
        terms = [n for n in means if "/" in n and "norm" not in n]
        terms.sort(key=lambda name: "head" not in name)
        shown = {n: means[n] for n in ("loss", "accuracy", *terms)}
        self._screen.update(step, shown, speed)
        window.clear()

    def _evaluate(self, step: int, minival: state_lib.Resident) -> None:
        variables = student_variables(self._engine.state())
        score = self._evaluator(variables, minival, self.temperature(step))
        epoch = step / self.plan.steps_per_epoch
        values = {"epoch": epoch, "accuracy": score.accuracy, "loss": score.loss}
        self._writer.write(step, "eval", values)
        self._screen.epoch_line(epoch, "minival", score.accuracy, score.loss)
        self._ledger.evaluated = step
        if score.right > self._ledger.best_right:
            self._ledger.best_right, self._ledger.best_step = score.right, step
            self._best = jax.device_get(variables)

    def _restore(self) -> int:
        state = self._guard.run(self._first_state)
        if self._minival:
            self._best = jax.device_get(student_variables(state))
        found = self._saver.restore({"train": state, "best": self._best})
        if found is None:
            self._engine.load(state)
            self._step = 0
            return 0
        step, arrays, extra = found
        self._engine.load(arrays["train"])
        self._best = arrays["best"]
        self._ledger = Ledger(**extra)
        self._began -= self._ledger.seconds
        self._saved = self._step = step
        self._shown = self._ledger.images, self._ledger.step_seconds
        return step

    def _save(self, step: int) -> None:
        if step <= self._saved:
            return
        self._ledger.seconds = time.perf_counter() - self._began
        extra = dataclasses.asdict(self._ledger)
        arrays = {"train": self._engine.state(), "best": self._best}
        self._saver.save(step, arrays, extra=extra)
        # A kill must not cost more than one interval; steps made while this is being
        # written would come on top of it, up to another whole one.
        self._saver.wait()
        self._saved = step


def student_variables(state: state_lib.TrainState) -> PyTree:
    """The plain student's variables: what is evaluated and deployed."""
    return {
        "params": state.params["student"],
        "batch_stats": state.batch_stats["student"],
    }
