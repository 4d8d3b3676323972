"""What only a bucket does: it refuses, it does not answer, it has torn saves."""

import fake_bucket
import pytest
import states

from lakd_jax import errors, paths
from lakd_jax.store import bucket, checkpoint, locks, mirror, workdir

pytestmark = pytest.mark.usefixtures("objects")
OTHER = b'{"host": "far", "machine": "another", "process": 7, "claim": "x"}'


def steps_saved(folder, *steps):
    with checkpoint.Checkpointer(folder, keep=3) as saver:
        for step in steps:
            saver.save(step, states.make_state(step), extra={"epoch": step})


@pytest.fixture
def run(tmp_path):
    return paths.of(f"gs://{fake_bucket.BUCKET}/{tmp_path.name}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "there is no such bucket; create it first"),
        (fake_bucket.READ_ONLY, "no right to create and delete objects there"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_found_at_the_start(name, reason):
    """Promise 34: in one line."""
    with pytest.raises(errors.WorkdirError) as caught:
        workdir.prepare(f"gs://{name}/run", {})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"gs://{name}/run: cannot be written: {reason}")


def test_preparing_leaves_only_what_a_disk_has(objects, run):
    workdir.prepare(run, {"a": 1}).close()
    names = {name.rpartition("/")[2] for name in objects.names(run.name)}
    assert names == {"config.json", "environment.json"}


def test_a_torn_save_is_no_step_and_is_removed(objects, run):
    """Promise 1: a save that was killed has no commit_success.txt."""
    steps_saved(run / "checkpoints", 1, 2)
    torn = f"{run.name}/checkpoints/2/"
    objects.delete(f"{torn}{bucket.COMMITTED}")
    assert checkpoint.list_steps(run / "checkpoints") == [1]
    with checkpoint.Checkpointer(run / "checkpoints", keep=3) as saver:
        assert saver.restore(states.make_state())[0] == 1
        assert not objects.names(torn)
        saver.save(2, states.make_state(5), extra={})
    _, got, _ = checkpoint.restore_step(run / "checkpoints", 2, states.make_state())
    states.assert_same(got, states.make_state(5))


def test_a_bucket_that_does_not_answer_is_not_damage(objects, run):
    """Promise 3: no checkpoint is set aside for a fault of the network."""
    steps_saved(run / "checkpoints", 1)
    objects.fails = 403
    try:
        with pytest.raises(errors.WorkdirError, match="cannot be read"):
            checkpoint._read_manifest(run / "checkpoints" / "1")
        with pytest.raises(OSError):  # rather than no steps
            checkpoint.list_steps(run / "checkpoints")
    finally:
        objects.fails = 0
    assert checkpoint.list_steps(run / "checkpoints") == [1]


def test_appended_files_are_put_whole_when_they_have_changed(objects, run):
    name = f"{run.name}/metrics.jsonl"
    objects.replace(name, b"1\n")
    with workdir.prepare(run, {}):
        local = mirror.Mirror(run, ["metrics.jsonl", "absent.json"])
        with open(local.folder / "metrics.jsonl", "a") as file:
            file.write("2\n")
        assert objects.content(name) == b"1\n"
        local.put()
        assert objects.content(name) == b"1\n2\n"
        before = objects.requests
        local.put()
        assert objects.requests - before <= 2  # the lock is read, nothing is written
        (local.folder / "trackers").mkdir()
        (local.folder / "trackers" / "x.json").write_text("{}")
        local.put()
        assert objects.content(f"{run.name}/trackers/x.json") == b"{}"
        local.close()
    assert not local.folder.exists()


def test_nothing_is_put_into_a_run_that_another_process_has_taken(objects, run):
    with workdir.prepare(run, {}):
        local = mirror.Mirror(run, [])
        (local.folder / "metrics.jsonl").write_text("1\n")
        objects.replace(f"{run.name}/{locks.FILE}", OTHER)
        with pytest.raises(errors.WorkdirError, match="taken over by process 7 on far"):
            local.put()
        local.close()
    assert f"{run.name}/metrics.jsonl" not in objects.names()
    assert objects.content(f"{run.name}/{locks.FILE}") == OTHER


def test_a_run_starts_on_another_machine_once_its_owner_is_silent(
    objects, run, monkeypatch, caplog
):
    """Promise 8: the same command, wherever it is given."""
    monkeypatch.setattr(locks, "STALE", 0.3)
    monkeypatch.setattr(locks, "_POLL", 0.1)
    objects.replace(f"{run.name}/{locks.FILE}", OTHER)
    workdir.prepare(run, {}).close()
    assert "was in use by process 7 on far" in caplog.messages[0]
    assert "taken over from process 7 on far" in caplog.messages[1]
