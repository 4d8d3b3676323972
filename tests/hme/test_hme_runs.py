"""Tests both stages of an HME in one run, interrupted at several points."""

import dataclasses

import numpy as np
import pytest
import test_train_resume as resume
import tiny

from lakd_jax.config import resolved
from lakd_jax.hme import network
from lakd_jax.interop import weights
from lakd_jax.runs import phases, single
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir

TIMINGS = ("seconds", "step_seconds", "images_per_second")
pytestmark = pytest.mark.long  # each run compiles two steps

STEPS, EPOCHS = 4, 2  # steps per epoch, epochs per stage


@pytest.fixture(scope="module")
def mesh():
    with tiny.environment() as one:
        yield one


def config(tmp_path, **fields):
    fields = {"method": "none", "epochs": EPOCHS, "student__name": "hme"} | fields
    return resolved.resolve(tiny.small(tmp_path, **fields))


def train(settings, directory, guard):
    environment = single.environment(settings, guard, lambda text: None)
    with workdir.prepare(directory, settings.to_dict()):
        return phases.train(settings, directory, environment, None)


def finished(directory):
    """Returns (variables, result without timings, metrics) of both stages."""
    stages = [resume.finished(folder) for folder in (directory / "stage1", directory)]
    for timing in TIMINGS:
        stages[1][1]["stage1"].pop(timing, None)
    return stages


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, mesh):
    folder = tmp_path_factory.mktemp("unbroken")
    train(config(folder), folder / "run", interrupt.Guard())
    return folder / "run"


def test_both_stages_stopped_and_gone_on(unbroken, tmp_path):
    """Promise 12: stops inside each stage, and in the first evaluation of stage 1."""
    settings, parts = config(unbroken.parent), tmp_path / "parts"
    # One check per step and per batch: at the end of a stage, 2 of minival, 3 of test,
    # twice.
    for checks in (2, 1, 2 + STEPS + 2 + 2 * 3 + 2):
        with pytest.raises(interrupt.Interrupted):
            train(settings, parts, tiny.StopAfter(checks))
    steps = [checkpoints(parts / "stage1")[-1], checkpoints(parts)[-1]]
    assert steps == [EPOCHS * STEPS, 3]
    train(settings, parts, interrupt.Guard())
    for mine, theirs in zip(finished(unbroken), finished(parts), strict=True):
        resume.assert_equal_runs(mine, theirs)


def checkpoints(directory):
    names = (p.name for p in (directory / "checkpoints").iterdir())
    return sorted(int(n) for n in names if n.isdecimal())


def test_contents_of_a_finished_run(unbroken):
    (first, one, _), (second, two, _) = finished(unbroken)
    assert two["stage1"].items() <= one.items()
    assert two["stage1"]["kept_step"] == one["best_step"] > 0
    assert two["test_last"]["examples"] == one["test_last"]["examples"] == 45
    assert (one["epochs"], two["epochs"]) == (EPOCHS, EPOCHS)
    assert "stage1" not in one
    for after, before in zip(
        network.gates(second["params"]), network.gates(first["params"]), strict=True
    ):
        np.testing.assert_array_equal(after, before)  # property 11
    kernel = ("stage2", "block1", "expert1", "conv1", "kernel")
    after, before = second["params"], first["params"]
    for key in kernel:
        after, before = after[key], before[key]
    assert np.any(after != before)


def test_the_student_is_the_hard_tree(unbroken):
    loaded, card = weights.student(unbroken / workdir.STUDENT, "float32")
    assert loaded.model.temperature is None
    assert card["options"] == {"layout": "ltb", "base": "wrn_40_1", "output": "nce"}
    again = weights.load(
        "student",
        "hme",
        str(unbroken),
        dtype="float32",
        num_classes=3,
    )
    assert again.model == loaded.model


def test_a_finished_run_returns_its_result(unbroken):
    again = train(config(unbroken.parent), unbroken, tiny.StopAfter(0))
    assert again["stage1"]["epochs"] == EPOCHS


def test_the_other_layout_without_minival_keeps_the_last(tmp_path, mesh, monkeypatch):
    bare = dataclasses.replace(tiny.dataset(train=64), minival=tiny.split(0, 1))
    monkeypatch.setattr(single.data, "load", lambda *a, **k: bare)
    fields = {"hme__layout": "split", "hme__base": "wrn_10_1", "data__minival": 0.0}
    settings = config(tmp_path, epochs=1, **fields)
    result = train(settings, tmp_path / "run", interrupt.Guard())
    assert np.isfinite(result["test_last"]["loss"])
    assert result["stage1"]["kept_step"] == STEPS
    assert result["test_best_on_minival"] is None
