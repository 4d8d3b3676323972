"""When the training loop saves, on steps that cost nothing."""

import dataclasses

import numpy as np
import pytest
import tiny

from lakd_jax import errors
from lakd_jax.runtime import interrupt
from lakd_jax.store import checkpoint
from lakd_jax.training import loop as loop_lib
from lakd_jax.training import record as record_lib
from lakd_jax.training import state as state_lib

STEPS, EPOCH, EVERY = 10, 5, 3


def first_state():
    params = {"student": {"w": np.zeros(3, np.float32)}}
    return state_lib.TrainState(np.zeros((), np.int32), params, {}, ())


class Adding:
    """An engine whose steps add 1 to its weights; `seen` is called before each."""

    def __init__(self, seen):
        self._seen = seen

    def load(self, state):
        self._state = state

    def run(self, rows):
        state = self._state
        self._seen(int(state.step))
        params = {"student": {"w": state.params["student"]["w"] + 1}}
        self._state = dataclasses.replace(state, step=state.step + 1, params=params)
        return {"loss": np.zeros(1), "accuracy": np.zeros(1)}

    def read(self, pending):
        return pending

    def together(self, count):
        return 1

    def state(self):
        return self._state

    def close(self):
        pass


def loop(directory, guard, seen):
    """Ten steps in two epochs, of which every third is saved."""
    plan = record_lib.Plan(
        batch_size=4,
        drop_last=True,
        examples=4 * EPOCH,
        epochs=STEPS // EPOCH,
        log_every=EPOCH,
        eval_every=1,
        save_every=EVERY,
        steps_per_dispatch=1,
        keep=2,
    )
    one = record_lib.RunRecord(plan, directory, 0, first_state, None, None)
    return loop_lib.Fit(one, Adding(seen), guard)


def test_due_saves_are_on_disk_when_a_step_begins(tmp_path):
    """Promises 1, 6: whenever a kill comes, at most one save interval is lost."""
    found = {}

    def seen(step):
        found[step] = max(checkpoint.list_steps(tmp_path / "checkpoints"), default=0)

    loop(tmp_path, interrupt.Guard(), seen).run()
    assert found == {step: step // EVERY * EVERY for step in range(STEPS)}
    assert checkpoint.list_steps(tmp_path / "checkpoints")[-1] == STEPS


def test_no_step_begins_before_a_failed_save_is_reported(tmp_path, monkeypatch):
    """Promise 6: also where the failure comes after the save has returned."""
    from orbax.checkpoint import type_handlers

    async def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", full)
    made = []
    with pytest.raises(errors.CheckpointWriteError, match="No space"):
        loop(tmp_path, interrupt.Guard(), made.append).run()
    assert made == [0, 1, 2]


@pytest.mark.parametrize("stop", [4, EPOCH])
def test_a_stop_saves_the_last_finished_step(tmp_path, stop):
    """Promise 9: whether or not it is due, and the next start goes on from it."""
    made = []
    with pytest.raises(interrupt.Interrupted):
        loop(tmp_path, tiny.StopAfter(stop - 1), made.append).run()
    step, arrays, _ = checkpoint.read_arrays(tmp_path / "checkpoints", None)
    assert step == len(made) == stop
    assert arrays["train/params/student/w"].tolist() == [stop] * 3
    trained = loop(tmp_path, interrupt.Guard(), made.append).run()
    assert made == list(range(STEPS))
    assert trained.last["params"]["w"].tolist() == [STEPS] * 3
