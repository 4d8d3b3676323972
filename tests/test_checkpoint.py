"""Checkpoints come back bit for bit, or the damage is said."""

import json
import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lakd_jax import checkpoint, errors, manifest


def _replicated():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _state(seed=0, shape=(48, 16)):
    """Parameters, momentum, bfloat16, integers, key data, numpy and plain numbers."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "stem": {"kernel": jax.random.normal(keys[0], shape)},
        "head": {"bias": jax.random.normal(keys[1], (10,))},
    }
    on_device = {
        "params": params,
        "opt": optax.trace(0.9)
        .init(params)
        ._replace(trace=jax.tree.map(lambda x: 3 * x, params)),
        "bank": jax.random.normal(keys[2], (8, 4), jnp.bfloat16),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(keys[2]),
    }
    on_host = {"best": np.float32(seed / 3), "table": np.arange(6), "epoch": seed}
    return jax.device_put(on_device, _replicated()) | on_host


def _host(tree):
    return jax.tree.map(np.array, tree)


def _assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def _is_same(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with checkpoints 1 and 2, only to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with checkpoint.Checkpointer(folder, keep=3) as saver:
        saver.save(1, _state(1), extra={"epoch": 1})
        saver.save(2, _state(2), extra={"epoch": 2})
    return folder


@pytest.fixture
def copied(two_steps, tmp_path):
    return pathlib.Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def test_round_trip_is_exact_and_keeps_shardings(tmp_path):
    state = _state(7)
    extra = {"metrics": {"loss": 0.1, "none": None}, "list": (1, 2), 3: float("inf")}
    with checkpoint.Checkpointer(tmp_path / "c", keep=2) as saver:
        assert saver.restore(state) is None
        saver.save(7, state, extra=extra)
        saver.wait()
        assert saver.steps() == [7]
        step, got, back = saver.restore(state)
    assert step == 7
    assert back == json.loads(json.dumps(extra))
    _assert_same(got, state)
    assert got["params"]["stem"]["kernel"].sharding == _replicated()
    assert type(got["best"]) is np.float32
    assert type(got["epoch"]) is int


def test_restores_into_an_abstract_state(copied):
    state = _state(2)
    template = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        state,
    )
    step, got, _ = checkpoint.restore_step(copied, None, template)
    assert step == 2
    _assert_same(got, state)
    assert got["bank"].sharding == _replicated()
    # What was restored may be donated, as any state.
    double = jax.jit(lambda x: jax.tree.map(lambda y: y + y, x), donate_argnums=0)
    _assert_same(double(got["params"]), double(state["params"]))


def test_restore_step_and_read_arrays_choose_the_step(copied):
    step, got, extra = checkpoint.restore_step(copied, 1, _state())
    assert (step, extra) == (1, {"epoch": 1})
    _assert_same(got, _state(1))
    step, arrays, _ = checkpoint.read_arrays(copied, None)
    assert step == 2
    np.testing.assert_array_equal(
        arrays["params/stem/kernel"], _state(2)["params"]["stem"]["kernel"]
    )
    with pytest.raises(
        errors.NoCheckpointError, match=r"no checkpoint 5, but \[1, 2\]"
    ):
        checkpoint.restore_step(copied, 5, _state())
    with pytest.raises(errors.NoCheckpointError):
        checkpoint.read_arrays(copied / "absent", None)


def test_array_without_elements_comes_back(tmp_path):
    state = {"bank": jnp.zeros((0, 4)), "w": jnp.ones(3), "none": None, "empty": ()}
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(1, state, extra={})
        _assert_same(saver.restore(state)[1], state)


def test_state_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s), donate_argnums=0
    )
    state = jax.device_put(
        {f"w{i}": jnp.full((512, 512), float(i)) for i in range(8)}, _replicated()
    )
    before = _host(state)
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(1, state, extra={})
        old = state
        for _ in range(5):
            state = step(state)
        assert old["w0"].is_deleted()
        _, got, _ = saver.restore(state)
    _assert_same(got, before)


def test_host_array_may_change_right_after_save(tmp_path):
    state = {"table": np.zeros((1024, 1024))}
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(1, state, extra={})
        state["table"] += 1
        _, got, _ = saver.restore(state)
    assert not got["table"].any()


def test_keeps_the_newest_and_ignores_a_second_save_of_a_step(tmp_path):
    with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
        for step in (1, 2, 3, 10):
            saver.save(step, _state(step), extra={})
        saver.save(10, _state(11), extra={})
        saver.wait()
        assert saver.steps() == [3, 10]
        _assert_same(saver.restore(_state())[1], _state(10))
    with pytest.raises(ValueError, match="keep"):
        checkpoint.Checkpointer(tmp_path, keep=0)


def test_later_steps_of_an_abandoned_run_give_way(tmp_path):
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(50, _state(1), extra={})
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(50, _state(2), extra={})
        saver.wait()
        _assert_same(saver.restore(_state())[1], _state(2))
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(45, _state(3), extra={})
        saver.wait()
        assert saver.steps() == [45]


def _flip(folder, files, rng):
    """Flips one bit of one file, each bit of all files being as likely."""
    path = rng.choices(files, weights=[f.stat().st_size for f in files])[0]
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["data", "other"])
def test_no_flipped_bit_is_restored_silently(two_steps, tmp_path, part):
    rng = random.Random(part)
    template, older, newest = _state(), _state(1), _state(2)
    detected = 0
    for trial in range(100 if part == "data" else 40):
        folder = shutil.copytree(two_steps, tmp_path / str(trial))
        files = sorted(f for f in (folder / "2").rglob("*") if f.is_file())
        files = [f for f in files if (f.parent.name == "d") == (part == "data")]
        _flip(folder, [f for f in files if f.stat().st_size], rng)
        lines = []
        with checkpoint.Checkpointer(folder, keep=3, notify=lines.append) as saver:
            step, got, extra = saver.restore(template)
        assert extra == {"epoch": step}
        assert _is_same(got, newest if step == 2 else older), f"trial {trial}"
        assert len(lines) == (step == 1)
        assert (folder / "2.broken").is_dir() == (step == 1)
        detected += step == 1
        shutil.rmtree(folder)
    # Most of the data is array values, so a check that never fires would show.
    assert detected >= (50 if part == "data" else 1)


def _truncate(step):
    file = max((step / "state").rglob("d/*"), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def _drop_manifest(step):
    for file in step.rglob("manifest.ocdbt"):
        file.unlink()


def _empty(step):
    shutil.rmtree(step)
    step.mkdir()


def _garble_json(step):
    (step / "manifest" / "metadata").write_text("{not json")


def _alter_extra(step):
    file = step / "manifest" / "metadata"
    file.write_text(file.read_text().replace('"epoch": 2', '"epoch": 3'))


def _empty_json(step):
    (step / "manifest" / "metadata").write_text("[]")


def _swap_step(step):
    shutil.rmtree(step)
    shutil.copytree(step.with_name("1"), step)


@pytest.mark.parametrize(
    "harm",
    [
        _truncate,
        _drop_manifest,
        _empty,
        _garble_json,
        _alter_extra,
        _empty_json,
        _swap_step,
    ],
)
def test_damaged_newest_is_set_aside_and_the_older_used(copied, harm, capfd):
    harm(copied / "2")
    lines = []
    with checkpoint.Checkpointer(copied, keep=3, notify=lines.append) as saver:
        step, got, extra = saver.restore(_state())
        assert (step, extra) == (1, {"epoch": 1})
        _assert_same(got, _state(1))
        assert saver.steps() == [1]
        saver.save(2, _state(5), extra={})  # the freed number can be used again
        saver.wait()
        _assert_same(saver.restore(_state())[1], _state(5))
    (line,) = lines
    assert "\n" not in line and "damaged" in line and "2.broken" in line
    assert len(line) < 400
    assert (copied / "2.broken").is_dir()
    assert capfd.readouterr().err.count("\n") == 0


def test_stray_empty_step_does_not_hide_the_good_ones(copied, caplog):
    (copied / "9").mkdir()
    with checkpoint.Checkpointer(copied, keep=3) as saver:
        assert saver.restore(_state())[0] == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert sorted(p.name for p in copied.iterdir()) == ["1", "2", "9.broken"]


def test_none_left_is_an_error_now_and_at_the_next_start(copied):
    (copied / "2.broken").mkdir()
    for step in (1, 2):
        _truncate(copied / str(step))
    for _ in range(2):
        with checkpoint.Checkpointer(copied, keep=3) as saver:
            with pytest.raises(errors.NoCheckpointError, match="every checkpoint"):
                saver.restore(_state())
    names = sorted(p.name for p in copied.iterdir())
    assert names == ["1.broken", "2.broken", "2.broken-2"]


def _other_dtype(state):
    state["bank"] = state["bank"].astype(jnp.float32)


def _other_shape(state):
    state["params"]["stem"]["kernel"] = jnp.zeros((48, 17))


def _other_name(state):
    state["params"]["tail"] = state["params"].pop("head")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_other_dtype, ["bank: stored bfloat16[8, 4], needed float32[8, 4]"]),
        (_other_shape, ["kernel: stored float32[48, 16], needed float32[48, 17]"]),
        (
            _other_name,
            [
                "params/head/bias: stored float32[10], needed not",
                "params/tail/bias: stored not, needed float32[10]",
            ],
        ),
    ],
)
def test_other_structure_is_refused_and_nothing_renamed(copied, change, expected):
    template = _state()
    change(template)
    (copied / "9").mkdir()  # damaged, and newer: stays where it is as well
    with checkpoint.Checkpointer(copied, keep=3) as saver:
        with pytest.raises(errors.WorkdirError) as caught:
            saver.restore(template)
    for line in expected:
        assert line in str(caught.value)
    assert sorted(p.name for p in copied.iterdir()) == ["1", "2", "9"]


def test_long_list_of_differences_is_cut(tmp_path):
    with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(1, {f"w{i}": np.zeros(1) for i in range(30)}, extra={})
        with pytest.raises(errors.WorkdirError) as caught:
            saver.restore({"v": np.zeros(1)})
    message = str(caught.value)
    assert "31 leaves differ (first 8 shown)" in message
    assert len(message.splitlines()) <= 10


def test_checkpoint_of_a_newer_release_is_refused(copied, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 0)
    with checkpoint.Checkpointer(copied, keep=1) as saver:
        with pytest.raises(errors.WorkdirError, match="newer release"):
            saver.restore(_state())


def _fail_to_write(monkeypatch):
    from orbax.checkpoint import type_handlers

    async def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", full)


@pytest.mark.parametrize("call", ["wait", "close", "save", "restore"])
def test_failed_background_write_is_an_error_at_the_next_call(
    copied, monkeypatch, capfd, call
):
    state = _state(8)
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
    # keep=1, yet what was complete stays until a save succeeds.
    assert checkpoint.list_steps(copied) == [1, 2]
    if call != "close":
        saver.save(8, state, extra={})
        saver.close()
        assert 8 in checkpoint.list_steps(copied)
    assert capfd.readouterr().err == ""


def test_failed_write_does_not_hide_the_error_under_way(tmp_path, monkeypatch):
    _fail_to_write(monkeypatch)
    lines = []
    with pytest.raises(ZeroDivisionError):
        with checkpoint.Checkpointer(tmp_path, keep=1, notify=lines.append) as saver:
            saver.save(1, _state(), extra={})
            raise ZeroDivisionError
    assert "No space left" in lines[0]


def test_errors_of_the_blocking_part_and_of_a_useless_folder(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    with checkpoint.Checkpointer(tmp_path / "c", keep=1) as saver:
        with pytest.raises(TypeError):
            saver.save(1, _state(), extra={"x": object()})
        with monkeypatch.context() as patch:
            patch.setattr(saver._manager, "save", read_only)
            with pytest.raises(errors.CheckpointWriteError, match="Read-only"):
                saver.save(1, _state(), extra={})
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.CheckpointWriteError):
        checkpoint.Checkpointer(tmp_path / "file", keep=1)


def test_orbax_is_quiet_and_others_are_not(tmp_path, caplog):
    absl = logging.getLogger("absl")
    with caplog.at_level(logging.INFO, logger="absl"):
        with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
            saver.save(1, _state(), extra={})
            saver.restore(_state())
        assert not caplog.records
        absl.info("ours")
    assert [r.getMessage() for r in caplog.records] == ["ours"]


_RESTORER = """
import sys
import numpy as np
from lakd_jax import checkpoint
template = {f"w{i}": np.zeros((60, 60)) for i in range(40)}
with checkpoint.Checkpointer(sys.argv[1], keep=2) as saver:
    print(saver.restore(template)[0])
"""


def test_damage_is_told_in_one_line_on_the_terminal(tmp_path):
    state = {f"w{i}": np.random.rand(60, 60) for i in range(40)}
    with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
        saver.save(1, state, extra={})
        saver.save(2, state, extra={})
    _truncate(tmp_path / "2")
    command = [sys.executable, "-c", _RESTORER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    (line,) = done.stderr.splitlines()
    assert "2.broken" in line


_SAVER = """
import sys
import numpy as np
from lakd_jax import checkpoint
with checkpoint.Checkpointer(sys.argv[1], keep=2) as saver:
    found = saver.restore({"w": np.zeros((300, 1000))})
    first = 1 if found is None else found[0] + 1
    assert found is None or (found[1]["w"] == found[0]).all()
    print("from", first, flush=True)
    for step in range(first, 10000):
        saver.save(step, {"w": np.full((300, 1000), float(step))}, extra={})
        print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    rng = random.Random(0)
    folder, last = tmp_path / "checkpoints", 0
    for trial in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline().split()[0] == "from", f"trial {trial}"
        for _ in range(4):  # let a few saves begin, the kill falls into the next
            started = int(process.stdout.readline())
        time.sleep(rng.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        lines = []
        template = {"w": np.zeros((300, 1000))}
        with checkpoint.Checkpointer(folder, keep=2, notify=lines.append) as saver:
            step, got, _ = saver.restore(template)
        assert not lines
        assert (got["w"] == step).all()
        assert step >= max(started - 1, last)
        assert all(p.name.isdecimal() for p in folder.iterdir())
        last = step


_TWO = """
import pathlib
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import numpy as np
from jax.experimental import multihost_utils
from lakd_jax import checkpoint
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
state = {"w": jax.device_put(np.arange(16.0, dtype=np.float32), replicated), "n": 3}
folder = pathlib.Path(sys.argv[1])
with checkpoint.Checkpointer(folder, keep=2) as saver:
    for step in (1, 2, 3):
        saver.save(step, state, extra={"step": step})
    saver.wait()
    if jax.process_index() == 0:
        (folder / "3" / "manifest" / "metadata").write_text("{}")
    multihost_utils.sync_global_devices("damaged")
    step, got, extra = saver.restore(state)
    total = float(got["w"].addressable_data(0).sum())
    saver.save(4, got, extra={})
    saver.wait()
    print("result", step, total, extra, saver.steps())
"""


@pytest.mark.long
def test_two_processes_agree_on_what_is_damaged(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO, str(tmp_path), address, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    for out, err in outputs:
        assert "result 2 120.0 {'step': 2} [2, 4]" in out, err
    assert "3.broken" in outputs[0][1] and "3.broken" not in outputs[1][1]
