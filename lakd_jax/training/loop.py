"""The training loop: steps, metrics, evaluation, checkpoints, of one seed or several.

Everything about a step follows from (config, step), and what is carried between
steps is in the checkpoint, so a run that was stopped ends as one that was not.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from lakd_jax import errors
from lakd_jax.report import progress as progress_lib
from lakd_jax.runtime import interrupt
from lakd_jax.training import engine, record, teams
from lakd_jax.training import state as state_lib


@dataclasses.dataclass
class Fit:
    """The runs of some seeds in lockstep; `run` does all of it.

    Attributes:
      tracks: one a seed, with the same plan.
      team: runs the steps of all of them.
      until: a step that all of them have saved, from which they go on; None: the
        newest.
    """

    tracks: Sequence[record.Track]
    team: teams.Team
    guard: interrupt.Guard
    until: int | None = None

    @property
    def plan(self) -> record.Plan:
        """Of every track."""
        return self.tracks[0].plan

    def run(self) -> list[record.Trained]:
        """Trains from the newest checkpoints, or from the start, to the end.

        Raises:
          interrupt.Interrupted: stopped by a signal; the last step is saved.
          errors.NonFiniteError: a loss or gradient is NaN or infinite.
          errors.CheckpointWriteError, errors.NoCheckpointError: see there.
          errors.WorkdirError: the seeds' newest whole checkpoints are not of one step.
        """
        plan = self.plan
        with contextlib.ExitStack() as stack:
            stack.callback(self.team.close)
            start = self._restore(stack)
            for one in self.tracks:
                one.begin(stack, start)
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
        states = self.team.states()
        return [t.trained(s) for t, s in zip(self.tracks, states, strict=True)]

    def one_step(self) -> tuple[state_lib.TrainState, dict[str, float], engine.Costs]:
        """The first step alone, of the first seed: (state, its metrics, its costs)."""
        with contextlib.closing(self.team) as team:
            team.load([one.first_state() for one in self.tracks])
            told = team.run([one.rows(0, 1) for one in self.tracks])
            metrics = {n: float(v[0]) for n, v in team.read(told)[0].items()}
            return team.states()[0], metrics, team.costs()

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
                rows = [one.rows(step, stop) for one in self.tracks]
                began = time.perf_counter()
                told = self.team.run(rows)
                self._step = step + rows[0].shape[0]
                # The device works on this dispatch while the last one is read.
                previous, unread = unread, (step, told)
                step = self._step
                if previous:
                    self._read(*previous)
                self._spent(time.perf_counter() - began, images=rows[0].size)
                self.guard.check()
        except interrupt.Interrupted:
            if unread:
                self._read(*unread)
            raise
        if unread:
            began = time.perf_counter()
            self._read(*unread)
            self._spent(time.perf_counter() - began)
        return step

    def _at_boundary(self, step: int) -> None:
        """Metrics, evaluation, checkpoint, in this order: a stop loses none."""
        plan = self.plan
        epoch_end = step % plan.steps_per_epoch == 0
        noted = any(one.ledger.window for one in self.tracks)
        if noted and (epoch_end or step % plan.log_every == 0):
            self._flush(step)
        self._evaluate(step)
        if step % plan.save_every == 0 or step == plan.total_steps:
            self._save(step)

    def _next_boundary(self, step: int) -> int:
        plan = self.plan
        every = (plan.log_every, plan.steps_per_epoch, plan.save_every)
        return min(plan.total_steps, *((step // n + 1) * n for n in every))

    # ------------------------------------------------------------ its parts

    def _restore(self, stack: contextlib.ExitStack) -> int:
        found = []
        for one in self.tracks:
            state = self.guard.run(one.first_state)
            found.append(one.restore(stack, state, self.until))
        steps = [step for step, _ in found]
        if len(set(steps)) > 1:
            raise errors.WorkdirError(
                f"{self.tracks[0].directory.parent}: the newest whole checkpoints of "
                f"the seeds are of steps {', '.join(map(str, steps))}\n"
                "Give the command again: the seeds are then trained in turn."
            )
        self.team.load([state for _, state in found])
        self._step = steps[0]
        return self._step

    def _read(self, first: int, told: Any) -> None:
        for one, metrics in zip(self.tracks, self.team.read(told), strict=True):
            one.note(first, metrics)

    def _spent(self, seconds: float, images: int = 0) -> None:
        for one in self.tracks:
            one.ledger.images += images
            one.ledger.step_seconds += seconds

    def _flush(self, step: int) -> None:
        """A line of metrics for each seed; on the screen their mean."""
        told = [one.flush(step) for one in self.tracks]
        means, count = told[0][0], len(told)
        # All are in metrics.jsonl; the line has room for few, the head's first.
        terms = [n for n in means if "/" in n and "norm" not in n]
        terms.sort(key=lambda name: "head" not in name)
        names = ("loss", "accuracy", *terms)
        shown = {n: sum(own[n] for own, _ in told) / count for n in names}
        self._screen.update(step, shown, sum(speed for _, speed in told))

    def _evaluate(self, step: int) -> None:
        due = [one.evaluation_due(step) for one in self.tracks]
        if not any(due):
            return
        epoch = step / self.plan.steps_per_epoch
        for one, state, now in zip(self.tracks, self.team.states(), due, strict=True):
            if not now:
                continue
            score = one.evaluate(step, state)
            split = "minival" if len(due) == 1 else f"minival, seed {one.seed}"
            self._screen.epoch_line(epoch, split, score.accuracy, score.loss)

    def _save(self, step: int) -> None:
        late = [one.saved < step for one in self.tracks]
        if not any(late):
            return
        # A kill must not cost more than one interval; steps made while this is being
        # written would come on top of it, up to another whole one.
        for one, state, now in zip(self.tracks, self.team.states(), late, strict=True):
            if now:
                one.save(step, state)
        for one, now in zip(self.tracks, late, strict=True):
            if now:
                one.wait(step)
