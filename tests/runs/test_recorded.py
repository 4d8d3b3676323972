"""What a run's record names: its teacher, and where relative paths start."""

import pathlib

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from lakd_jax import errors, interop, models
from lakd_jax.config import resolved
from lakd_jax.data import sources
from lakd_jax.explain import subject
from lakd_jax.interop import weights
from lakd_jax.runs import command, phase_run, rows, single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir

SCORE = {"right": 40, "examples": 45, "accuracy": 40 / 45, "loss": 0.5}


def finished(directory, names=tiny.CLASSES, **result):
    """The files of a finished run of NETWORK that others can start from."""
    directory.mkdir(parents=True)
    model = tiny.SMALL(num_classes=len(names))
    network = weights.Loaded(model, None, "", (0.4,) * 3, (0.3,) * 3)
    card = {"student": tiny.NETWORK, "class_names": list(names)} | result
    weights.save(directory / workdir.STUDENT, tiny.variables(model), network, card)
    workdir.write_json(directory / workdir.RESULT, card)
    return directory


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A finished run, started in `a` with relative paths; the current folder is `b`."""
    data = tiny.dataset(**tiny.COUNTS)
    for name in "ab":
        (tmp_path / name).mkdir()
    arrays = {
        f"{role}_{what}": getattr(getattr(data, role), what)
        for role in ("train", "test")
        for what in ("images", "labels")
    }
    np.savez(tmp_path / "a/a.npz", **arrays, classes=np.array(tiny.CLASSES))
    fields = {"data__source": "npz:a.npz", "teacher__init": "teacher"}
    config = tiny.small(tmp_path, method="kd", **fields)
    teacher = finished(tmp_path / "a/teacher")
    run = finished(tmp_path / "a/run", teacher_test=SCORE, test_last=SCORE)
    monkeypatch.chdir(tmp_path / "a")
    for directory in (run, run / "kd"):
        with single.prepare(directory, resolved.resolve(config)):
            pass
    digest = weights.load(
        "teacher",
        tiny.NETWORK,
        str(teacher),
        dtype="float32",
        num_classes=3,
    ).digest
    note = {"weights": digest, "source": "teacher/student.safetensors"}
    workdir.write_json(run / workdir.TEACHER, note)
    monkeypatch.chdir(tmp_path / "b")
    return run, config


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Runs know NETWORK and use one device."""
    networks = {**models._NETWORKS, tiny.NETWORK: tiny.SMALL}
    monkeypatch.setattr(models, "_NETWORKS", networks)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(mesh_lib, "data_mesh", lambda: mesh)


def test_explain_finds_data_and_teacher_from_any_folder(started, monkeypatch):
    """It trains and evaluates nothing, and leaves nothing in the current folder."""
    run, _ = started
    monkeypatch.setattr(phase_run, "train_one", None)
    monkeypatch.setattr(single, "evaluator", None)
    found = subject.load(run, interrupt.Guard(), lambda line: None)
    assert found.teacher.score.right == 40
    assert found.environment.dataset.classes == tiny.CLASSES
    assert list(pathlib.Path().iterdir()) == []
    # A baseline's folder has the record of its command.
    assert teacher_lib._record_of(run / "kd") == run / workdir.TEACHER


def test_a_missing_or_other_teacher_is_an_error_with_both_names(started):
    """Promise 16: a report is about the teacher that the run had."""
    run, _ = started
    teacher = run.parent / "teacher" / workdir.STUDENT
    then = workdir.read_json(run / workdir.TEACHER)["weights"]
    note = {"weights": "0123", "source": str(teacher)}
    for fault, words in (
        (lambda: workdir.write_json(run / workdir.TEACHER, note), ["0123", then]),
        (teacher.unlink, ["0123", "does not exist"]),
        ((run / workdir.TEACHER).unlink, ["has no teacher.json"]),
    ):
        fault()
        with pytest.raises(errors.TeacherError) as caught:
            subject.load(run, interrupt.Guard(), lambda line: None)
        assert all(word in str(caught.value) for word in [*words, str(run)])
        assert "has no" in str(caught.value) or str(teacher) in str(caught.value)


def test_a_run_resumed_from_another_folder_reads_the_same_files(started, monkeypatch):
    run, config = started
    lines = []
    monkeypatch.setattr(command, "_draw", lambda *arguments: None)
    monkeypatch.setattr(command, "_table", lambda *arguments: "")
    command.run(config, run, guard=interrupt.Guard(), notify=lines.append)
    assert lines[0].startswith(f"relative paths start in {run.parent}")
    assert f"from {run.parent}/teacher" in lines[2]


def test_where_relative_paths_start(tmp_path, monkeypatch):
    """The folder of the first start, handed on to the folders within a run."""
    here = pathlib.Path()
    assert workdir.folder(tmp_path) == here  # not recorded
    with workdir.prepare(tmp_path / "run", {}):
        pass
    with workdir.prepare(tmp_path / "run/kd", {}, folder=tmp_path):
        pass
    started = pathlib.Path.cwd()
    assert workdir.folder(tmp_path / "run") == here
    assert workdir.folder(tmp_path / "run/kd") == tmp_path
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert workdir.folder(tmp_path / "run") == started
    with workdir.prepare(tmp_path / "c", {}):
        pass
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").rmdir()
    assert workdir.folder(tmp_path / "c") == here  # moved with all it names


def test_sources_with_a_relative_path(monkeypatch):
    there = pathlib.Path("/there")
    monkeypatch.setitem(sources._ADDED, "squares", None)
    for source, found in {
        "folder:images": "folder:/there/images",
        "npz:/data/a.npz": "npz:/data/a.npz",
        "npz:~/a.npz": f"npz:{pathlib.Path.home()}/a.npz",
        "squares:20": "squares:20",
        "digits": "digits",
    }.items():
        assert sources.located(source, there) == found
        assert sources.located(source, pathlib.Path()) == source


def test_a_report_reads_the_entry_of_a_file_that_the_run_read(started, tmp_path):
    run, config = started
    model = tiny.SMALL(num_classes=3)
    state = interop.to_torch(tiny.NETWORK, tiny.variables(model))
    both = {f"first.{key}": 0 * array for key, array in state.items()}
    both |= {f"second.{key}": array for key, array in state.items()}
    interop.save_torch_file(tmp_path / "both.safetensors", both)
    config.teacher.update(init=str(tmp_path / "both.safetensors"), init_key="second")
    c, guard = resolved.resolve(config), interrupt.Guard()
    environment = single.environment(c, guard, lambda _: None, workdir.folder(run))
    loaded = single.load_network("teacher", c, environment)
    note = {"weights": loaded.digest, "source": loaded.source}
    workdir.write_json(run / workdir.TEACHER, note)
    assert teacher_lib.load_recorded(run, c, environment).digest == loaded.digest


# ----------------------------------------------------------- a teacher of other classes


@pytest.mark.parametrize("method", ["at", "kd"])
def test_a_teacher_of_other_classes_serves_methods_without_logits(started, method):
    run, config = started
    other = finished(run.parent / "other", ("up", "down", "left", "right"))
    config.update(method=method)
    config.teacher.init = str(other)
    c, lines = resolved.resolve(config), []
    folder = workdir.folder(run)
    environment = single.environment(c, interrupt.Guard(), lines.append, folder)
    if method == "kd":
        with pytest.raises(errors.TeacherError) as caught:
            teacher_lib.make(c, environment)
        for words in (
            "has 4 classes, the data has 3",
            "only in the weights: down, up",
            "only in the data: dark",
            "Method kd reads the teacher's logits",
            "use it: at, ",
        ):
            assert words in str(caught.value)
        assert " lakd" not in str(caught.value)
        return
    teacher = teacher_lib.make(c, environment)
    assert teacher.score is None and "is not tested" in lines[-1]
    row = rows.teacher_row(c, teacher)
    assert "| - " in " ".join(command.table.render([row]).split())
    assert "images" not in command.table.render([row]).splitlines()[-1]


def test_a_cache_that_cannot_be_written_names_its_field(tmp_path):
    (tmp_path / "file").write_text("")
    fields = {"method": "kd", "teacher__cache": str(tmp_path / "file")}
    config = resolved.resolve(tiny.small(tmp_path, **fields))
    with tiny.environment():
        environment = single.environment(config, interrupt.Guard(), lambda line: None)
        with pytest.raises(errors.WorkdirError, match=r"^teacher.cache: .*\n.*another"):
            teacher_lib.make(config, environment)
