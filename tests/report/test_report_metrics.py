import json
import math
import pathlib

import pytest
import tensorboardX.proto.event_pb2 as event_pb2

from lakd_jax.report import metrics
from lakd_jax.store import bucket, locks


def _write(workdir, steps, resume_step=None):
    with metrics.MetricWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": 1 / step, "module1/kd": 0.1 * step})
            if step % 2 == 0:
                writer.write(step, "eval", {"accuracy": step / 10})


def _write_run(workdir, steps, resume_step=None):
    """Writes as a run does, which has its directory for itself."""
    bucket.make_folder(workdir)
    release = locks.hold(workdir)
    _write(workdir, steps, resume_step)
    release()


def _events(workdir):
    """Returns the events of all files; a record has 12 bytes before and 4 after it."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    return found


def _visible(events):
    """Returns what TensorBoard shows: a restart hides events from its step on."""
    shown = []
    for event in events:
        if event.session_log.status == 1:
            shown = [old for old in shown if old[0] < event.step]
        shown += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return shown


@pytest.mark.parametrize("resume_step", [None, 0, 3, 4, 6])
def test_resumed_files_equal_the_unbroken_ones(place, resume_step):
    _write_run(place / "unbroken", range(1, 9))
    _write_run(place / "broken", range(1, 7))
    _write_run(place / "broken", range((resume_step or 0) + 1, 9), resume_step)
    files = [place / name / "metrics.jsonl" for name in ("unbroken", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    shown = [_visible(_events(file.parent)) for file in files]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 8 * 2 + 4


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    _write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    intact = path.read_bytes()
    path.write_bytes(intact + b'{"step": 3, "kind": "ev')
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 2, 3]
    _write(tmp_path, [], resume_step=3)
    assert path.read_bytes() == intact


def test_lines_are_on_disk_at_once_and_in_the_agreed_form(tmp_path):
    with metrics.MetricWriter(tmp_path / "new" / "run", resume_step=None) as writer:
        writer.write(7, "train", {"loss": 0.5, "module1/kd": 2.0})
        line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
        tags = [tag for _, tag, _ in _visible(_events(tmp_path / "new" / "run"))]
    assert line == '{"step": 7, "kind": "train", "loss": 0.5, "module1/kd": 2.0}\n'
    assert tags == ["train/loss", "train/module1/kd"]


def test_values_that_are_not_finite_keep_the_file_valid_json(tmp_path):
    with metrics.MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, "train", {"loss": math.nan, "norm": math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] is None
    assert math.isnan(metrics.read(tmp_path)[0]["loss"])


def test_names_of_the_record_itself_are_refused(tmp_path):
    with metrics.MetricWriter(tmp_path, resume_step=None) as writer:
        with pytest.raises(ValueError, match="kind"):
            writer.write(1, "train", {"kind": 1.0})


def test_reading_where_nothing_was_written(tmp_path):
    assert metrics.read(tmp_path) == []


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize(
    ("name", "file", "kept"),
    [("", "_lines", (1, 5)), ("tensorboard", "_events", (5, 1))],
)
def test_full_disk_warns_once_and_lets_training_go_on(tmp_path, name, file, kept):
    """Promise 34: failing metrics do not stop a run, nor do they stop each other."""
    warnings = []
    with metrics.MetricWriter(
        tmp_path, resume_step=None, warn=warnings.append
    ) as writer:
        writer.write(1, "train", {"loss": 1.0})
        victim = writer._writing[name]
        getattr(victim, file).close()
        setattr(victim, file, open("/dev/full", "ab"))
        for step in range(2, 6):
            writer.write(step, "train", {"loss": 1.0})
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert str(tmp_path) in warnings[0] and "No space left" in warnings[0]
    assert name in warnings[0]
    assert (len(metrics.read(tmp_path)), len(_visible(_events(tmp_path)))) == kept


def test_unusable_directory_warns_instead_of_raising(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with metrics.MetricWriter(tmp_path / "file", resume_step=2) as writer:
        writer.write(3, "train", {"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: metrics cannot be written")
    assert lines[1].startswith("warning: tracker tensorboard of") and len(lines) == 2
