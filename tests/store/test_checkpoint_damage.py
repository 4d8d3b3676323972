"""A damaged checkpoint is detected, reported and renamed; the next older is used."""

import random
import time

import numpy as np
import places
import processes
import pytest
import states

from lakd_jax import errors, paths
from lakd_jax.store import bucket, checkpoint


def _flip(folder, files, rng):
    """Flips one bit, drawn uniformly from all bits of all files."""
    path = rng.choices(files, weights=[bucket.size(f) for f in files])[0]
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


LONG = pytest.mark.long
FLIPS = [("data", 20), ("other", 8)]


@pytest.mark.parametrize(
    ("part", "trials"),
    [*FLIPS, *(pytest.param(p, 5 * n, marks=LONG) for p, n in FLIPS)],
)
def test_no_flipped_bit_is_restored_silently(copied_in, place, part, trials, caplog):
    """Promise 2: in a hundred trials the restored state is the saved one."""
    if paths.is_bucket(place):
        trials //= 4  # the same code above another one's storage
    rng = random.Random(f"{part} {trials}")
    template, older, newest = map(states.make_state, range(3))
    detected = 0
    for trial in range(trials):
        folder = places.copied(copied_in, place / str(trial))
        files = [f for f in places.files(folder / "2") if f.name != bucket.COMMITTED]
        files = [f for f in files if (f.parent.name == "d") == (part == "data")]
        _flip(folder, [f for f in files if bucket.size(f)], rng)
        caplog.clear()
        with checkpoint.Checkpointer(folder, keep=3) as saver:
            step, got, extra = saver.restore(template)
        assert extra == {"epoch": step}
        assert states.is_same(got, newest if step == 2 else older), f"trial {trial}"
        assert len(caplog.messages) == (step == 1)
        assert (folder / "2.broken").is_dir() == (step == 1)
        detected += step == 1
        places.remove(folder)
    # Most bytes are array values, so a check that never fails would be noticed.
    assert detected >= (trials // 2 if part == "data" else 1)


def _truncate(step):
    files = [f for f in places.files(step / "state") if f.parent.name == "d"]
    file = max(files, key=bucket.size)
    file.write_bytes(file.read_bytes()[: bucket.size(file) // 2])


def _drop_manifest(step):
    for file in places.files(step):
        if file.name == "manifest.ocdbt":
            file.unlink()


def _empty(step):
    places.remove(step)
    bucket.make_folder(step)
    (step / bucket.COMMITTED).write_text("")  # without which no bucket has it


def _garble_json(step):
    (step / "manifest" / "metadata").write_text("{not json")


def _alter_extra(step):
    file = step / "manifest" / "metadata"
    file.write_text(file.read_text().replace('"epoch": 2', '"epoch": 3'))


def _empty_json(step):
    (step / "manifest" / "metadata").write_text("[]")


def _swap_step(step):
    places.remove(step)
    places.copied(step.with_name("1"), step)


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
def test_damaged_newest_is_set_aside_and_the_older_used(copied_in, harm, capfd, caplog):
    """Promise 3: renamed, reported in one line, and the older one restored."""
    harm(copied_in / "2")
    with checkpoint.Checkpointer(copied_in, keep=3) as saver:
        step, got, extra = saver.restore(states.make_state())
        assert (step, extra) == (1, {"epoch": 1})
        states.assert_same(got, states.make_state(1))
        assert saver.steps() == [1]
        saver.save(2, states.make_state(5), extra={})  # the number is free again
        saver.wait()
        states.assert_same(saver.restore(states.make_state())[1], states.make_state(5))
    (line,) = caplog.messages
    assert "\n" not in line and "damaged" in line and "2.broken" in line
    assert len(line) < 400
    assert (copied_in / "2.broken").is_dir()
    assert capfd.readouterr().err.count("\n") == 0


def test_stray_empty_step_does_not_hide_the_good_ones(copied, caplog):
    (copied / "9").mkdir()
    with checkpoint.Checkpointer(copied, keep=3) as saver:
        assert saver.restore(states.make_state())[0] == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert sorted(p.name for p in copied.iterdir()) == ["1", "2", "9.broken"]


def test_none_left_is_an_error_now_and_at_the_next_start(copied_in):
    places.copied(copied_in / "1", copied_in / "2.broken")
    for step in (1, 2):
        _truncate(copied_in / str(step))
    for _ in range(2):
        with checkpoint.Checkpointer(copied_in, keep=3) as saver:
            with pytest.raises(errors.NoCheckpointError, match="every checkpoint"):
                saver.restore(states.make_state())
    names = sorted(p.name for p in copied_in.iterdir())
    assert names == ["1.broken", "2.broken", "2.broken-2"]


_RESTORER = """
import sys
import numpy as np
from lakd_jax.store import checkpoint
template = {f"w{i}": np.zeros((60, 60)) for i in range(40)}
with checkpoint.Checkpointer(sys.argv[1], keep=2) as saver:
    print(saver.restore(template)[0])
"""


def test_damage_is_told_in_one_line_on_the_terminal(tmp_path):
    """Promise 3: without Orbax's pages of output."""
    state = {f"w{i}": np.random.rand(60, 60) for i in range(40)}
    with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
        saver.save(1, state, extra={})
        saver.save(2, state, extra={})
    _truncate(tmp_path / "2")
    process = processes.start("-c", _RESTORER, tmp_path)
    ((code, out, err),) = processes.ended([process])
    assert (code, out) == (0, "1\n"), err
    (line,) = err.splitlines()
    assert "2.broken" in line


_SAVER = """
import sys
import numpy as np
from lakd_jax.store import checkpoint
with checkpoint.Checkpointer(sys.argv[1], keep=2) as saver:
    found = saver.restore({"w": np.zeros((300, 1000))})
    first = 1 if found is None else found[0] + 1
    assert found is None or (found[1]["w"] == found[0]).all()
    print("from", first, flush=True)
    for step in range(first, 10000):
        saver.save(step, {"w": np.full((300, 1000), float(step))}, extra={})
        print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_whole_checkpoints(place, caplog):
    """Promise 1: even if a save is nearly always in progress."""
    rng = random.Random(0)
    folder, last = place / "checkpoints", 0
    for trial in range(2):
        process = processes.start("-c", _SAVER, folder)
        assert process.stdout.readline().split()[0] == "from", f"trial {trial}"
        for _ in range(4):  # after a few saves, the kill interrupts the next
            started = int(process.stdout.readline())
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        template = {"w": np.zeros((300, 1000))}
        with checkpoint.Checkpointer(folder, keep=2) as saver:
            step, got, _ = saver.restore(template)
        assert not caplog.messages
        assert (got["w"] == step).all()
        assert step >= max(started - 1, last)
        left = {p.name for p in folder.iterdir()} - set(map(str, saver.steps()))
        assert len(left) <= 1, left  # remains of kills do not accumulate
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
from lakd_jax.store import checkpoint
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


@LONG
def test_two_processes_agree_on_what_is_damaged(tmp_path):
    address = f"localhost:{processes.free_port()}"
    both = [processes.start("-c", _TWO, tmp_path, address, i) for i in range(2)]
    first, second = processes.ended(both, timeout=120)
    for _, out, err in (first, second):
        assert "result 2 120.0 {'step': 2} [2, 4]" in out, err
    assert "3.broken" in first[2] and "3.broken" not in second[2]
