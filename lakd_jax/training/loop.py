"""The training loop: steps, metrics, evaluation, checkpoints.

A step is determined by (config, step) and by the state, all of which is in the
checkpoint. A resumed run therefore ends exactly as an uninterrupted one.
"""

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np

from lakd_jax.report import progress as progress_lib
from lakd_jax.runtime import interrupt
from lakd_jax.training import engine as engine_lib
from lakd_jax.training import record as record_lib
from lakd_jax.training import state as state_lib


@dataclasses.dataclass
class Fit:
    """One training run, from restoring a checkpoint to the final state."""

    record: record_lib.RunRecord
    engine: engine_lib.Engine
    guard: interrupt.Guard

    @property
    def plan(self) -> record_lib.Plan:
        """Returns the length of the run and its intervals."""
        return self.record.plan

    def run(self) -> record_lib.Trained:
        """Trains to the end, starting from the newest checkpoint if there is one.

        Raises:
          interrupt.Interrupted: stopped by a signal; the last step is saved.
          errors.NonFiniteError: a loss or gradient is NaN or infinite.
          errors.CheckpointWriteError: a checkpoint cannot be written.
          errors.NoCheckpointError: no checkpoint can be read.
        """
        plan = self.plan
        with contextlib.ExitStack() as stack:
            stack.callback(self.engine.close)
            self._compiled: set[tuple[int, ...]] = set()
            start = self._restore(stack)
            self.record.begin(stack, start)
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
        return self.record.trained(self.engine.state())

    def one_step(
        self,
    ) -> tuple[state_lib.TrainState, dict[str, float], engine_lib.Costs]:
        """Runs only the first step and returns the state, its metrics and its costs."""
        with contextlib.closing(self.engine) as engine:
            engine.load(self.record.first_state())
            metrics = engine.read(engine.run(self.record.rows(0, 1)))
            first = {name: float(values[0]) for name, values in metrics.items()}
            return engine.state(), first, engine.costs()

    # ------------------------------------------------------------ the loop

    def _loop(self, step: int) -> None:
        total = self.plan.total_steps
        if step:
            self._at_boundary(step)  # what an interrupt may have left undone
        while step < total:
            step = self._advance(step, self._next_boundary(step))
            self._at_boundary(step)

    def _advance(self, step: int, stop: int) -> int:
        """Dispatches the steps up to `stop` and reads their metrics."""
        unread: tuple[int, Any] | None = None
        compiled = self._compiled
        try:
            while step < stop:
                count = self.engine.together(self.record.alike(step, stop))
                rows = self.record.rows(step, count)
                began = time.perf_counter()
                pending = self.engine.run(rows)
                self._step = step + rows.shape[0]
                # The device works on this dispatch while the previous one is read.
                previous, unread = unread, (step, pending)
                step = self._step
                if previous:
                    self._read(*previous)
                # The first of its shape is compiled: its time says nothing of speed.
                images = np.sum(rows >= 0).item()
                self.record.progress.images += images
                if rows.shape in compiled:
                    self._count_time(time.perf_counter() - began, images)
                compiled.add(rows.shape)
                self.guard.check()
        except interrupt.Interrupted:
            if unread:
                self._read(*unread)
            raise
        if unread:
            began = time.perf_counter()
            self._read(*unread)
            self._count_time(time.perf_counter() - began)
        return step

    def _at_boundary(self, step: int) -> None:
        """Writes metrics, evaluates, then saves, so that an interrupt loses nothing."""
        plan = self.plan
        epoch_end = step % plan.steps_per_epoch == 0
        if self.record.progress.window and (epoch_end or step % plan.log_every == 0):
            self._flush(step)
        if self.record.evaluation_due(step):
            score = self.record.evaluate(step, self.engine.state())
            epoch = step / plan.steps_per_epoch
            self._screen.epoch_line(epoch, "minival", score.accuracy, score.loss)
        if step % plan.save_every == 0 or step == plan.total_steps:
            self._save(step)

    def _next_boundary(self, step: int) -> int:
        plan = self.plan
        every = (plan.log_every, plan.steps_per_epoch, plan.save_every)
        return min(plan.total_steps, *((step // n + 1) * n for n in every))

    # ------------------------------------------------------------ helpers

    def _restore(self, stack: contextlib.ExitStack) -> int:
        with self.guard.released():
            first = self.record.first_state()
        self._step, state = self.record.restore(stack, first)
        self.engine.load(state)
        return self._step

    def _read(self, first: int, pending: Any) -> None:
        self.record.note(first, self.engine.read(pending))

    def _count_time(self, seconds: float, images: int = 0) -> None:
        self.record.progress.timed_images += images
        self.record.progress.step_seconds += seconds

    def _flush(self, step: int) -> None:
        """Writes a line of metrics and shows it on the screen."""
        means, speed = self.record.flush(step)
        # The screen has room for a few terms, the head's first; metrics.jsonl has all.
        terms = [n for n in means if "/" in n and "norm" not in n]
        terms.sort(key=lambda name: "head" not in name)
        names = ("loss", "accuracy", *terms)
        self._screen.update(step, {name: means[name] for name in names}, speed)

    def _save(self, step: int) -> None:
        # Blocks until it is written: a kill must lose at most one interval, and steps
        # made during the write would be lost in addition.
        if self.record.saved < step:
            self.record.save(step, self.engine.state())
