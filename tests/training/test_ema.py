"""Tests the moving average of a student: timm's values, engines, files and resuming."""

import dataclasses
import json

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_engines as engines
import test_train_resume as resume
import test_train_step as steps

from lakd_jax import interop
from lakd_jax.explain import subject
from lakd_jax.store import checkpoint, workdir
from lakd_jax.training import ema
from lakd_jax.training import state as state_lib

GOLDEN = dict(np.load(golden_weights.FOLDER / "recipes" / "ema.npz"))
NAMES = ("weight", "bias", "running_mean")
LONG = pytest.mark.long


def golden(prefix, i):
    """Returns the golden variables with `prefix`, number `i`, as of a student."""
    found = {name: GOLDEN[prefix + name][i] for name in NAMES}
    stats = {"mean": found.pop("running_mean"), "count": np.int32(10 * i)}
    return {"params": {"student": found}, "batch_stats": {"student": stats}}


@pytest.mark.parametrize(
    ("case", "rule", "first"),
    [
        ("v3_decay0.9", ema.Average(0.9), 0),
        ("v3_warmup", ema.Average(0.9999, warmup=True), 0),
        # Without the copy of the first update.
        ("v3_decay0.9_no_step", ema.Average(0.9), 1),
        ("v2_decay0.9", ema.Average(0.9), 1),
    ],
)
def test_averages_are_those_of_timm(case, rule, first):
    average = golden("model_", 0)
    for i in range(8):
        model = golden("model_", i + 1)
        average = rule.updated(average, jnp.int32(first + i), model)
        wanted = golden(f"{case}/", i)
        del wanted["batch_stats"]["student"]["count"]
        assert average["batch_stats"]["student"].pop("count") == 10 * (i + 1)
        far = jax.tree.map(golden_weights.distance, average, wanted)
        assert max(jax.tree.leaves(far)) < 1e-6
        average["batch_stats"]["student"]["count"] = np.int32(0)


@pytest.mark.parametrize("case", ["v3_decay0.9", "v3_warmup"])
def test_decays_are_those_of_timm(case):
    warmup = case == "v3_warmup"
    rule = ema.Average(0.9999 if warmup else 0.9, warmup)
    found = [rule.decay_at(step - 1) for step in GOLDEN["steps"]]
    np.testing.assert_allclose(found, GOLDEN[f"{case}/decays"], rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the states after each of three steps, by engine, and the spec."""
    folder = tmp_path_factory.mktemp("ema")
    setting = steps.small(folder, 1, method="lakd", optim__ema=0.75)
    found = {}
    for kind in ("fused", "dispatch"):
        engine = engines.engine(kind, setting, folder)
        found[kind] = [setting[1]]
        for row in steps.rows(3):
            engine.read(engine.run(row[None]))
            found[kind].append(jax.device_get(engine.state()))
    return found


def test_every_module_averages_its_variables(trained):
    """Parameters and batch statistics, and nothing of the method's."""
    for states in trained.values():
        one, two, three = (state.variables("student") for state in states[1:])
        expected = jax.tree.map(
            lambda a, b, c: 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c, one, two, three
        )
        steps.assert_close(states[-1].average_variables(), expected, rtol=1e-5)
        assert all(set(tree) == {"student"} for tree in states[-1].average.values())


def test_engines_average_alike(trained):
    ours, fused = trained["dispatch"][-1], trained["fused"][-1]
    assert jax.tree.structure(ours) == jax.tree.structure(fused)
    steps.assert_close(ours.average, fused.average, rtol=2e-4, atol=2e-6)


def test_states_without_an_average_are_as_before(trained):
    state = trained["fused"][-1]
    plain = dataclasses.replace(state, average={})
    assert set(state.to_tree()) - set(plain.to_tree()) == {"average"}
    for one in (state, plain):
        back = state_lib.TrainState.from_tree(one.to_tree())
        assert jax.tree.structure(back) == jax.tree.structure(one)


# ----------------------------------------------------------------------------- runs

RECIPE = {
    "optim__name": "adamw",
    "optim__lr": 1e-2,
    "optim__ema": 0.5,
    "optim__ema_warmup": True,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    yield from resume.lab_of(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def folders(lab):
    """Returns the folders of two runs by what they export: averages, or weights."""
    found = {}
    for used in (True, False):
        found[used] = lab.root / str(used)
        lab.train(found[used], method="none", optim__ema_used=used, **RECIPE)
    return found


def files(folder):
    """Returns {file name: variables} of the weights in a run's folder."""
    paths = folder.glob("*.safetensors")
    return {path.name: interop.load_variables(path)[0] for path in paths}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_average_is_exported_and_evaluated_by_choice(folders):
    averages, weights = files(folders[True]), files(folders[False])
    assert set(averages) == {workdir.STUDENT, workdir.BEST}
    assert set(weights) == {workdir.STUDENT, workdir.BEST, workdir.AVERAGE}
    assert_same(averages[workdir.STUDENT], weights[workdir.AVERAGE])
    leaf = ("params", "head", "dense", "kernel")
    kernels = [found[workdir.STUDENT] for found in (averages, weights)]
    for key in leaf:
        kernels = [tree[key] for tree in kernels]
    assert np.any(kernels[0] != kernels[1])
    first, second = (
        json.loads((folders[used] / workdir.RESULT).read_text())
        for used in (True, False)
    )
    assert second["test_average"]["loss"] == first["test_last"]["loss"]
    assert second["test_last"]["loss"] != first["test_last"]["loss"]
    assert "test_average" not in first


def test_reports_read_what_was_exported(folders):
    for used, folder in folders.items():
        saved = folder / workdir.CHECKPOINTS
        step = checkpoint.list_steps(saved)[-1]
        _, arrays, _ = checkpoint.read_arrays(saved, step)
        student = subject.part(arrays, "student", averaged=used)
        assert_same(student, files(folder)[workdir.STUDENT])


def test_a_stopped_run_ends_as_the_unbroken_one(lab, folders, tmp_path):
    """Promise 12: AdamW's moments, their counts, and the average."""
    lab.stop(tmp_path, 0, 7, method="none", **RECIPE)
    lab.train(tmp_path, method="none", **RECIPE)
    resume.assert_equal_runs(resume.finished(folders[True]), resume.finished(tmp_path))


@LONG
@pytest.mark.parametrize(("engine", "devices"), [("dispatch", 1), ("pipeline", 2)])
def test_other_engines_resume_alike(engine, devices, tmp_path):
    fields = {"method": "lakd", "local__engine": engine, **RECIPE}
    for lab in resume.lab_of(tmp_path, devices):
        lab.assert_resumes(tmp_path, **fields)
