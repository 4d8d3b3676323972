"""A run in a bucket is that on a disk: trained, stopped, resumed, used."""

import commands
import fake_bucket
import jax
import numpy as np
import pytest
import tiny

from lakd_jax import api, errors, evaluation, explain, export, interop
from lakd_jax.report import metrics
from lakd_jax.runs import command, single
from lakd_jax.runtime import interrupt
from lakd_jax.store import checkpoint, locks, workdir

# ml_collections loads config files in a way deprecated since Python 3.12.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("objects", "tiny_data"),
]
BUCKET = f"gs://{fake_bucket.BUCKET}"
COMMITTED = "commit_success.txt"
OTHER = b'{"host": "far", "machine": "another", "process": 7, "claim": "x"}'


def train(config, directory, guard=None):
    options = tiny.quiet() | ({"guard": guard} if guard else {})
    return command.run(config, directory, **options)


def arrays(directory):
    variables, _ = interop.load_variables(f"{directory}/{workdir.STUDENT}")
    return jax.tree.map(np.ndarray.tobytes, variables)


@pytest.fixture(scope="module")
def run(objects, tiny_data, tmp_path_factory):
    """A run with a teacher, both in the bucket, that was stopped and resumed."""
    config = tiny.small(
        tmp_path_factory.mktemp("bucket"),
        epochs=2,
        method="kd",
        teacher__cache=f"{BUCKET}/teachers",
        baselines=("none",),
    )
    directory = f"{BUCKET}/runs/kd"
    with pytest.raises(interrupt.Interrupted):
        train(config, directory, tiny.StopAfter(25))
    train(config, directory)
    return directory


def test_it_ends_as_on_a_disk(run, tmp_path):
    """Promise 12: weights and metrics are the same to the bit."""
    config = tiny.small(tmp_path, epochs=2, method="kd", baselines=("none",))
    train(config, tmp_path / "kd")
    assert arrays(run) == arrays(tmp_path / "kd")
    for folder in ("", "/none"):
        (ours, disk) = (metrics.read(f"{d}{folder}") for d in (run, tmp_path / "kd"))
        assert ours == disk and len(disk) == 4


def test_it_has_the_files_of_a_run_and_no_lock(objects, run):
    names = {name.removeprefix("runs/kd/") for name in objects.names("runs/kd/")}
    assert {"config.json", "environment.json", "teacher.json", "result.json"} <= names
    assert {"student.safetensors", "metrics.jsonl", "table.md"} <= names
    assert {"curves.png", "attention.png", "none/student.safetensors"} <= names
    events = [n for n in names if n.startswith("events.out.tfevents.")]
    assert len(events) == 1  # it was stopped in the teacher's or the baseline's run
    assert any(name.endswith("/result.json") for name in objects.names("teachers/"))
    assert not [n for n in names if n.endswith((locks.FILE, ".tmp"))]
    assert objects.content("runs/kd/curves.png").startswith(b"\x89PNG")


def test_its_student_is_loaded_evaluated_and_exported(objects, run):
    loaded = api.load(run)
    images = tiny.split(45, 2)
    right = int(np.sum(loaded(images.images).argmax(-1) == images.labels))
    assert right == loaded.result["test_last"]["right"]
    assert loaded.history == metrics.read(run)
    path = export.run(run, "safetensors", notify=lambda text: None)
    assert str(path) == f"{run}/export/small.safetensors"
    exported = interop.load_torch_file(path)
    again = interop.load_torch_file(str(path))
    jax.tree.map(np.testing.assert_array_equal, exported, again)
    assert objects.content("runs/kd/export/small.md")
    found = evaluation.run(run, **tiny.quiet())
    assert found["accuracy"] == loaded.accuracy
    assert b"predicted" in objects.content("runs/kd/evaluation/predictions.csv")


@pytest.mark.long
def test_its_report_is_written(objects, run):
    explain.run(run, **tiny.quiet())
    assert b"<html" in objects.content("runs/kd/report.html")


def test_its_directory_is_a_teacher_whose_outputs_are_kept(objects, run, tmp_path):
    fields = {"teacher__views": 1, "teacher__cache": f"{BUCKET}/teachers"}
    fields |= {"teacher__init": run, "seeds": (1,)}
    config = tiny.small(tmp_path, epochs=1, method="kd", **fields)
    said = []
    options = {"guard": interrupt.Guard(), "notify": said.append}
    command.run(config, f"{BUCKET}/runs/seeds", **options)
    source = workdir.read_json(f"{BUCKET}/runs/seeds/teacher.json")["source"]
    assert source == f"{run}/student.safetensors"
    assert [n for n in objects.names("teachers/small-views-") if "logits" in n]
    assert "1 of 1 views" in "\n".join(said)
    said.clear()
    command.run(config, tmp_path / "disk", **options)
    assert "views" not in "\n".join(said)
    assert arrays(tmp_path / "disk/seed1") == arrays(f"{BUCKET}/runs/seeds/seed1")


class Thief(interrupt.Guard):
    """Takes the run over once it has a checkpoint, as another machine would."""

    def __init__(self, objects, directory):
        super().__init__()
        self._objects, self._directory, self._done = objects, directory, False

    def check(self):
        saved = self._objects.names(f"{self._directory}/checkpoints/")
        if not self._done and f"{self._directory}/checkpoints/4/{COMMITTED}" in saved:
            self._done = True
            self._objects.replace(f"{self._directory}/{locks.FILE}", OTHER)


def test_a_run_that_was_taken_over_saves_nothing_more(objects, tmp_path):
    """Promise 1: no process writes into a run that another continues."""
    config = tiny.small(tmp_path, method="none")
    directory = f"{BUCKET}/runs/stolen"
    with pytest.raises(errors.WorkdirError, match="taken over by process 7 on far"):
        train(config, directory, Thief(objects, "runs/stolen"))
    assert checkpoint.list_steps(f"{directory}/checkpoints") == [4]
    assert [r["step"] for r in metrics.read(directory)] == [4, 4]
    assert objects.content("runs/stolen/.lock") == OTHER


def test_a_run_that_was_taken_over_at_once_keeps_its_config(objects, tmp_path):
    """Its new owner needs it."""

    def take(text):
        objects.replace("runs/early/.lock", OTHER)
        raise errors.DataError("it cannot begin")

    config = tiny.small(tmp_path, method="none")
    with pytest.raises(errors.DataError):
        command.run(config, f"{BUCKET}/runs/early", notify=take)
    assert set(objects.names("runs/early/")) >= {"runs/early/config.json"}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--workdir=gs://absent/run", "gs://absent/run: cannot be written: "),
        ("--workdir=gs://read-only/run", "gs://read-only/run: cannot be written: "),
        (
            "--workdir=run --config.teacher.cache=gs://read-only/t",
            "teacher.cache: gs://read-only/t: cannot be written: ",
        ),
    ],
)
def test_what_cannot_be_written_is_found_before_the_data(
    main, monkeypatch, tmp_path, flags, line
):
    """Promise 34: in one line."""

    def begun(*_):
        raise AssertionError("the data were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(single, "environment", begun)
    (found,) = commands.assert_refused(
        main(commands.DIGITS, *flags.split())
    ).splitlines()
    assert found.startswith(line)
