"""A stopped run ends as one that was not stopped, to the last bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from lakd_jax import config as config_lib
from lakd_jax import distill, interop, interrupt, workdir
from lakd_jax.report import metrics
from lakd_jax.train import networks, runs, teachers
from lakd_jax.train import state as state_lib

LONG = pytest.mark.long


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(runs.data, "load", lambda *a, **k: tiny.dataset())
    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(state_lib, "data_mesh", lambda: one)
    return lambda config, guard: runs.bench(config, guard, lambda text: None)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


def teacher_for(config, bench, teacher_dir):
    """One teacher for all tests here, trained by the first that asks."""
    config = config_lib.changed(config, {"teacher.cache": str(teacher_dir)})
    return teachers.make(config, bench)


def train(config, directory, bench, guard, teacher_dir):
    config = config_lib.resolve(config)
    own = bench(config, interrupt.Guard())
    teacher = None
    if config.method != "none":
        teacher = teacher_for(config, own, teacher_dir)
    with workdir.prepare(directory, config_lib.to_dict(config)):
        return runs.train_one(
            config, directory, dataclasses.replace(own, guard=guard), teacher
        )


def finished(directory):
    variables, _ = interop.load_variables(directory / networks.STUDENT_FILE)
    result = json.loads((directory / networks.RESULT_FILE).read_text())
    for timing in ("seconds", "step_seconds", "images_per_second"):
        del result[timing]
    return variables, result, metrics.read(directory)


def assert_equal_runs(one, other):
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert one[1] == other[1]
    assert one[2] == other[2]


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        ("none", 20),  # at the edge of an epoch; 17 lies inside
        ("lakd", 17),
        *(pytest.param("none", 17, marks=LONG), pytest.param("lakd", 20, marks=LONG)),
        *(
            pytest.param(method, stop, marks=LONG)
            for method in sorted({*distill.names()} - {"none", "lakd"})
            for stop in (17, 20)
        ),
    ],
)
def test_stopped_run_ends_as_the_unbroken_one(
    method, stop, tmp_path, bench, teacher_dir
):
    """Promise 12: every method, within an epoch and at its edge."""
    config = tiny.config(tmp_path, method=method)
    train(config, tmp_path / "whole", bench, interrupt.Guard(), teacher_dir)
    # One check a step and one an evaluation batch: 3 batches at each epoch's end.
    checks = stop - 1 + 3 * ((stop - 1) // 10)
    with pytest.raises(interrupt.Interrupted):
        train(config, tmp_path / "parts", bench, tiny.StopAfter(checks), teacher_dir)
    assert saved_steps(tmp_path / "parts")[-1] == stop
    train(config, tmp_path / "parts", bench, interrupt.Guard(), teacher_dir)
    assert_equal_runs(finished(tmp_path / "whole"), finished(tmp_path / "parts"))


@pytest.mark.parametrize(("engine", "devices"), [("dispatch", 1), ("pipeline", 2)])
@LONG
def test_other_engines_resume_alike(
    engine, devices, tmp_path, bench, teacher_dir, monkeypatch
):
    """Promise 12: a program a module, and modules on devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    monkeypatch.setattr(state_lib, "data_mesh", lambda: mesh)
    config = tiny.config(tmp_path, method="lakd", local__engine=engine)
    train(config, tmp_path / "whole", bench, interrupt.Guard(), teacher_dir)
    with pytest.raises(interrupt.Interrupted):
        train(config, tmp_path / "parts", bench, tiny.StopAfter(16 + 3), teacher_dir)
    assert saved_steps(tmp_path / "parts")[-1] == 17
    train(config, tmp_path / "parts", bench, interrupt.Guard(), teacher_dir)
    assert_equal_runs(finished(tmp_path / "whole"), finished(tmp_path / "parts"))


def test_stop_during_an_evaluation_repeats_it(tmp_path, bench, teacher_dir):
    config = tiny.config(tmp_path, method="none")
    train(config, tmp_path / "whole", bench, interrupt.Guard(), teacher_dir)
    with pytest.raises(interrupt.Interrupted):
        train(config, tmp_path / "parts", bench, tiny.StopAfter(11), teacher_dir)
    assert saved_steps(tmp_path / "parts") == [10]
    kinds = [r["kind"] for r in metrics.read(tmp_path / "parts")]
    assert "eval" not in kinds  # it was stopped in the middle of one
    train(config, tmp_path / "parts", bench, interrupt.Guard(), teacher_dir)
    assert_equal_runs(finished(tmp_path / "whole"), finished(tmp_path / "parts"))


@LONG
def test_every_reading_with_state_resumes(tmp_path, bench, teacher_dir):
    """Promise 12: heads, starts of modules, gates, a clipped gradient."""
    config = tiny.config(
        tmp_path,
        lakd__task="aux_heads",
        lakd__att_global=True,
        local__module_start_epochs=(0.0, 1.0, 2.0),
        local__cut_scale=0.3,
        optim__clip_norm=1.0,
        checkpoint__every_steps=7,
        data__drop_last=False,
        student__vam__enabled=True,
        student__vam__init_std=0.1,
    )
    train(config, tmp_path / "whole", bench, interrupt.Guard(), teacher_dir)
    with pytest.raises(interrupt.Interrupted):
        train(config, tmp_path / "parts", bench, tiny.StopAfter(24), teacher_dir)
    train(config, tmp_path / "parts", bench, interrupt.Guard(), teacher_dir)
    assert_equal_runs(finished(tmp_path / "whole"), finished(tmp_path / "parts"))


def test_finished_run_is_not_trained_again(tmp_path, bench, teacher_dir):
    config = tiny.config(tmp_path, method="none", epochs=1)
    first = train(config, tmp_path / "run", bench, interrupt.Guard(), teacher_dir)
    again = train(config, tmp_path / "run", bench, tiny.StopAfter(0), teacher_dir)
    assert first == again


def saved_steps(directory):
    names = (p.name for p in (directory / "checkpoints").iterdir())
    return sorted(int(n) for n in names if n.isdecimal())
