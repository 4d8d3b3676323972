"""A stopped and resumed run ends exactly like an uninterrupted one."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from lakd_jax import export, interop
from lakd_jax.config import resolved
from lakd_jax.report import metrics
from lakd_jax.runs import phase_run, single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir
from lakd_jax.training import phase

LONG = pytest.mark.long


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setattr(single.data, "load", lambda *a, **k: tiny.dataset())
    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(mesh_lib, "data_mesh", lambda: one)
    return make_environment


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


def make_environment(config, guard):
    return single.environment(config, guard, lambda text: None)


def train(config, directory, environment, guard, teacher):
    """Trains; `teacher` is a teacher, or a cache that the first caller trains it in."""
    config = resolved.resolve(config)
    shared = environment(config, interrupt.Guard())
    if config.method == "none":
        teacher = None
    elif not isinstance(teacher, single.Teacher):
        changed = dataclasses.replace(config.teacher, cache=str(teacher))
        teacher = teacher_lib.make(dataclasses.replace(config, teacher=changed), shared)
    with workdir.prepare(directory, config.to_dict()):
        return phase_run.train_one(
            phase.first(config),
            directory,
            dataclasses.replace(shared, guard=guard),
            teacher,
        )


def finished(directory):
    variables, _ = interop.load_variables(directory / workdir.STUDENT)
    result = json.loads((directory / workdir.RESULT).read_text())
    for timing in ("seconds", "step_seconds", "images_per_second"):
        del result[timing]
    return variables, result, metrics.read(directory)


def assert_equal_runs(one, other):
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert one[1] == other[1]
    assert one[2] == other[2]


def saved_steps(directory):
    names = (p.name for p in (directory / "checkpoints").iterdir())
    return sorted(int(n) for n in names if n.isdecimal())


@dataclasses.dataclass(frozen=True)
class Lab:
    """Runs methods and engines on `tiny.environment`; `root` holds their folders."""

    root: object
    teacher: single.Teacher

    def config(self, **fields):
        return tiny.small(self.root, **({"log_every": 3} | fields))

    def train(self, folder, guard=None, **fields):
        arguments = make_environment, guard or interrupt.Guard(), self.teacher
        return train(self.config(**fields), folder, *arguments)

    def stop(self, folder, start, step, evaluated=True, **fields):
        """Resumes at step `start`, whose evaluation may be due; stops at `step`."""
        # One check per step and per evaluation batch: 2 batches at each epoch's end.
        first = start + 1 if evaluated else start
        ends = [e for e in range(first, step) if e % 4 == 0]
        guard = tiny.StopAfter(step - start - 1 + 2 * len(ends))
        with pytest.raises(interrupt.Interrupted):
            self.train(folder, guard, **fields)
        assert saved_steps(folder)[-1] == step

    def assert_resumes(self, folder, **fields):
        """Checks that a stopped run ends as the unbroken one, whose folder it returns.

        Also returns the variables of its student.
        """
        self.train(folder / "whole", **fields)
        self.stop(folder / "parts", 0, 7, **fields)
        self.train(folder / "parts", **fields)
        whole, parts = (finished(folder / name) for name in ("whole", "parts"))
        assert_equal_runs(whole, parts)
        return folder / "whole", whole[0]

    def assert_resumes_and_exports(self, folder, **fields):
        """Checks also that the exported file has the variables, which it returns."""
        whole, variables = self.assert_resumes(folder, **fields)
        state = interop.load_torch_file(export.run(whole, "safetensors"))
        restored = interop.from_torch(fields["student__name"], state)
        jax.tree.map(np.testing.assert_array_equal, restored, variables)
        return variables


def lab_of(root, devices=1, **counts):
    with tiny.environment(devices, **counts) as mesh:
        yield Lab(root, tiny.teacher(mesh))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    yield from lab_of(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def unbroken(lab):
    """Returns the folder of an uninterrupted run of a method, trained once."""

    @functools.cache
    def run(method):
        lab.train(lab.root / method, method=method)
        return lab.root / method

    return run


@LONG
def test_a_run_stopped_again_and_again_ends_as_the_unbroken_one(lab, unbroken, place):
    """Promises 9, 12: in an evaluation, within an epoch, and at its end."""
    fields, parts = {"method": "none"}, place / "parts"
    with pytest.raises(interrupt.Interrupted):
        lab.train(parts, tiny.StopAfter(5), **fields)
    assert saved_steps(parts) == [4]
    kinds = [r["kind"] for r in metrics.read(parts)]
    assert kinds == ["train", "train"]  # it was stopped in the middle of an evaluation
    lab.stop(parts, 4, 7, evaluated=False, **fields)
    lab.stop(parts, 7, 8, **fields)
    lab.train(parts, **fields)
    assert_equal_runs(finished(unbroken("none")), finished(parts))


# Methods with their own parameters, with running statistics, with a memory.
@pytest.mark.parametrize(
    "method",
    ["lakd", *(pytest.param(m, marks=LONG) for m in ("dkd+at", "afd", "rtk", "crd"))],
)
def test_stopped_run_ends_as_the_unbroken_one(method, lab, unbroken, tmp_path):
    """Promise 12: whatever a method keeps from step to step."""
    lab.stop(tmp_path / "parts", 0, 7, method=method)
    lab.train(tmp_path / "parts", method=method)
    assert_equal_runs(finished(unbroken(method)), finished(tmp_path / "parts"))


@pytest.mark.parametrize(("engine", "devices"), [("dispatch", 1), ("pipeline", 2)])
@LONG
def test_other_engines_resume_alike(engine, devices, tmp_path):
    """Promise 12: one program per module, and modules on several devices."""
    fields = {"method": "lakd", "local__engine": engine}
    for lab in lab_of(tmp_path, devices):
        lab.train(tmp_path / "unbroken", **fields)
        lab.stop(tmp_path / "parts", 0, 7, **fields)
        lab.train(tmp_path / "parts", **fields)
    assert_equal_runs(finished(tmp_path / "unbroken"), finished(tmp_path / "parts"))


@LONG
def test_every_reading_with_state_resumes(tmp_path):
    """Promise 12: heads, starts of modules, gates, a clipped gradient."""
    fields = {
        "lakd__task": "aux_heads",
        "lakd__att_global": True,
        "local__module_start_epochs": (0.0, 1.0, 2.0),
        "local__cut_scale": 0.3,
        "optim__clip_norm": 1.0,
        "checkpoint__every_steps": 7,
        "data__drop_last": False,
        "student__vam__enabled": True,
        "student__vam__init_std": 0.1,
    }
    for lab in lab_of(tmp_path, train=70):  # five steps per epoch, the last of 6 images
        lab.train(tmp_path / "unbroken", **fields)
        with pytest.raises(interrupt.Interrupted):
            lab.train(tmp_path / "parts", tiny.StopAfter(9), **fields)
        assert saved_steps(tmp_path / "parts")[-1] == 8
        lab.train(tmp_path / "parts", **fields)
    assert_equal_runs(finished(tmp_path / "unbroken"), finished(tmp_path / "parts"))
