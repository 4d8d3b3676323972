"""Checkpoints are restored bit for bit."""

import asyncio
import gc
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states

from lakd_jax import errors
from lakd_jax.store import checkpoint, manifest


def save(folder, step, state, keep=1):
    """Saves `state` and returns the steps that are then on disk."""
    with checkpoint.Checkpointer(folder, keep=keep) as saver:
        saver.save(step, state, extra={})
    return checkpoint.list_steps(folder)


def restored(folder, template, keep=1):
    with checkpoint.Checkpointer(folder, keep=keep) as saver:
        return saver.restore(template)[1]


def test_round_trip_is_exact_and_keeps_shardings(place):
    state = states.make_state(7)
    extra = {"metrics": {"loss": 0.1, "none": None}, "list": (1, 2), 3: float("inf")}
    with checkpoint.Checkpointer(place / "c", keep=2) as saver:
        assert saver.restore(state) is None
        saver.save(7, state, extra=extra)
        saver.wait()
        assert saver.steps() == [7]
        step, got, back = saver.restore(state)
    assert step == 7
    assert back == json.loads(json.dumps(extra))
    states.assert_same(got, state)
    assert got["params"]["stem"]["kernel"].sharding == states.replicated()
    assert type(got["best"]) is np.float32
    assert type(got["epoch"]) is int
    # A restored state may be donated, like any other.
    double = jax.jit(lambda x: jax.tree.map(lambda y: y + y, x), donate_argnums=0)
    states.assert_same(double(got["params"]), double(state["params"]))


def test_restore_step_and_read_arrays_choose_the_step(copied):
    step, got, extra = checkpoint.restore_step(copied, 1, states.make_state())
    assert (step, extra) == (1, {"epoch": 1})
    states.assert_same(got, states.make_state(1))
    step, arrays, _ = checkpoint.read_arrays(copied, None)
    assert step == 2
    np.testing.assert_array_equal(
        arrays["params/stem/kernel"], states.make_state(2)["params"]["stem"]["kernel"]
    )
    with pytest.raises(
        errors.NoCheckpointError, match=r"no checkpoint 5, but \[1, 2\]"
    ):
        checkpoint.restore_step(copied, 5, states.make_state())
    with pytest.raises(errors.NoCheckpointError):
        checkpoint.read_arrays(copied / "absent", None)


def test_array_without_elements_comes_back(tmp_path):
    state = {"bank": jnp.zeros((0, 4)), "w": jnp.ones(3), "none": None, "empty": ()}
    save(tmp_path, 1, state)
    states.assert_same(restored(tmp_path, state), state)


def test_state_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s), donate_argnums=0
    )
    state = jax.device_put(
        {f"w{i}": jnp.full((512, 512), float(i)) for i in range(8)}, states.replicated()
    )
    before = states.host(state)
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(1, state, extra={})
        old = state
        for _ in range(5):
            state = step(state)
        assert old["w0"].is_deleted()
        _, got, _ = saver.restore(state)
    states.assert_same(got, before)


def test_host_array_may_change_right_after_save(tmp_path):
    state = {"table": np.zeros((1024, 1024))}
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(1, state, extra={})
        state["table"] += 1
        _, got, _ = saver.restore(state)
    assert not got["table"].any()


def test_keeps_the_newest_and_ignores_a_second_save_of_a_step(place):
    """Promise 5: no more than `keep` checkpoints are left."""
    with checkpoint.Checkpointer(place, keep=2) as saver:
        for step in (1, 2, 3, 10):
            saver.save(step, states.make_state(step), extra={})
        saver.save(10, states.make_state(11), extra={})
        saver.wait()
        assert saver.steps() == [3, 10]
        states.assert_same(saver.restore(states.make_state())[1], states.make_state(10))
    with pytest.raises(ValueError, match="keep"):
        checkpoint.Checkpointer(place, keep=0)


def test_later_steps_of_an_abandoned_run_are_replaced(place):
    for step, seed in ((50, 1), (50, 2), (45, 3)):
        assert save(place, step, states.make_state(seed)) == [step]
        found = restored(place, states.make_state())
        states.assert_same(found, states.make_state(seed))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda state: state.update(bank=state["bank"].astype(jnp.float32)),
            ["bank: stored bfloat16[8, 4], needed float32[8, 4]"],
        ),
        (
            lambda state: state["params"]["stem"].update(kernel=jnp.zeros((48, 17))),
            ["kernel: stored float32[48, 16], needed float32[48, 17]"],
        ),
        (
            lambda state: state["params"].update(tail=state["params"].pop("head")),
            [
                "params/head/bias: stored float32[10], needed not",
                "params/tail/bias: stored not, needed float32[10]",
            ],
        ),
    ],
    ids=["dtype", "shape", "name"],
)
def test_other_structure_is_refused_and_nothing_renamed(copied, change, expected):
    """Promise 4: the leaves that differ are listed."""
    template = states.make_state()
    change(template)
    (copied / "9").mkdir()  # damaged and newer, but not renamed either
    with pytest.raises(errors.WorkdirError) as caught:
        restored(copied, template, keep=3)
    for line in expected:
        assert line in str(caught.value)
    assert sorted(p.name for p in copied.iterdir()) == ["1", "2", "9"]


def test_long_list_of_differences_is_cut(tmp_path):
    """Promise 4: eight leaves are enough."""
    save(tmp_path, 1, {f"w{i}": np.zeros(1) for i in range(30)})
    with pytest.raises(errors.WorkdirError) as caught:
        restored(tmp_path, {"v": np.zeros(1)})
    message = str(caught.value)
    assert "31 leaves differ (first 8 shown)" in message
    assert len(message.splitlines()) <= 10


def test_checkpoint_of_a_newer_release_is_refused(copied, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 0)
    with pytest.raises(errors.WorkdirError, match="newer release"):
        restored(copied, states.make_state())


def _fail_to_write(monkeypatch):
    from orbax.checkpoint import type_handlers

    async def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", full)


@pytest.mark.parametrize("call", ["wait", "close", "save", "restore"])
def test_failed_background_write_is_an_error_at_the_next_call(
    copied, monkeypatch, capfd, call
):
    """Promise 6: an unfinished save is not mistaken for a finished one."""
    state = states.make_state(8)
    calls = {"save": ((9, state), {"extra": {}}), "restore": ((state,), {})}
    args, options = calls.get(call, ((), {}))
    saver = checkpoint.Checkpointer(copied, keep=1)
    with monkeypatch.context() as patch:
        _fail_to_write(patch)
        saver.save(8, state, extra={})
        with pytest.raises(errors.CheckpointWriteError, match="No space") as caught:
            getattr(saver, call)(*args, **options)
    assert caught.value.exit_code == 5
    assert len(str(caught.value).splitlines()) <= 3
    # keep=1, but a complete checkpoint is kept until a save succeeds.
    assert checkpoint.list_steps(copied) == [1, 2]
    if call != "close":
        saver.save(8, state, extra={})
        saver.close()
        assert 8 in checkpoint.list_steps(copied)
    assert capfd.readouterr().err == ""


def test_failed_write_does_not_hide_the_error_under_way(tmp_path, monkeypatch, caplog):
    _fail_to_write(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
            saver.save(1, states.make_state(), extra={})
            raise ZeroDivisionError
    assert "No space left" in caplog.messages[0]


def test_errors_of_the_blocking_part_and_of_a_useless_folder(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    with checkpoint.Checkpointer(tmp_path / "c", keep=1) as saver:
        with pytest.raises(TypeError):
            saver.save(1, states.make_state(), extra={"x": object()})
        with monkeypatch.context() as patch:
            patch.setattr(saver._manager, "save", read_only)
            with pytest.raises(errors.CheckpointWriteError, match="Read-only"):
                saver.save(1, states.make_state(), extra={})
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.CheckpointWriteError):
        checkpoint.Checkpointer(tmp_path / "file", keep=1)


def test_orbax_is_quiet_and_others_are_not(tmp_path, caplog):
    absl = logging.getLogger("absl")
    with caplog.at_level(logging.INFO, logger="absl"):
        save(tmp_path, 1, states.make_state())
        restored(tmp_path, states.make_state())
        assert not caplog.records
        absl.info("ours")
    assert [r.getMessage() for r in caplog.records] == ["ours"]


class _Read:
    """A future that fails like TensorStore's: an awaitable, but not a coroutine."""

    def __await__(self):
        yield
        raise ValueError("unreadable")


async def _task():
    raise ValueError("ours")


async def _abandon(read):
    """Waits for `read` and a failed future, without retrieving their exceptions."""
    future = asyncio.get_running_loop().create_future()
    future.set_exception(ValueError('NOT_FOUND: Error reading "w1/0.0"'))
    await asyncio.wait([asyncio.ensure_future(read), future])


def test_abandoned_reads_are_quiet_and_other_tasks_are_not(tmp_path, caplog):
    with checkpoint.Checkpointer(tmp_path, keep=1):
        asyncio.run(_abandon(_Read()))
        gc.collect()
        assert not caplog.records
        asyncio.run(_abandon(_task()))
        gc.collect()
    assert [r.name for r in caplog.records] == ["asyncio"]
