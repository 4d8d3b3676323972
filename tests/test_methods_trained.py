"""Every method in `config_methods` in the real step: devices, seeds, a stop."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_train_resume as resume
import test_train_step as steps
import tiny

from lakd_jax import config_methods, distill, models
from lakd_jax.train import learner as learner_lib
from lakd_jax.train import step

bench, teacher_dir = resume.bench, resume.teacher_dir

LONG = pytest.mark.long
METHODS = sorted(config_methods.blocks())
STATEFUL = ("crd", "ctkd", "kdpp", "ofd")
FIELDS = {"crd": {"crd__negatives": 16}}


def several(names, quick):
    """All of them, of which the `quick` ones are not marked long."""
    return [n if n in quick else pytest.param(n, marks=LONG) for n in names]


def fields(name):
    """A method at once at its full weight, where it has a warm-up."""
    own = {f"{n}__warmup_epochs": 0.0 for n in name.split("+")}
    own |= {
        f"{n}__init_epochs": 1
        for n in name.split("+")
        if "init_epochs" in config_methods.blocks()[n]
    }
    given = FIELDS.get(name, {})
    return {"method": name, "optim__lr": 1e-4, **own, **given}


@pytest.mark.parametrize("name", several(METHODS, ("dkd", "crd")))
def test_devices_take_the_step_of_one(name, tmp_path):
    one, eight = (
        steps.one_step(steps.make(tmp_path, n, **fields(name)), steps.rows(1)[0])
        for n in (1, 8)
    )
    np.testing.assert_allclose(eight[1]["loss"], one[1]["loss"], rtol=1e-4)
    for a, b in zip(
        *(jax.tree.leaves(s.batch_stats) for s, _ in (one, eight)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    for a, b in zip(*(jax.tree.leaves(s.params) for s, _ in (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("name", several(METHODS, ("at",)))
def test_seeds_in_one_program_are_those_apart(name, tmp_path):
    """What a method draws and remembers is a seed's own."""
    made = [steps.make(tmp_path, 1, seed=s, **fields(name)) for s in (0, 1)]
    learner, _, teacher, _ = made[0]
    states, data = (
        jax.tree.map(lambda *x: jax.numpy.stack(x), *(m[i] for m in made))
        for i in (1, 3)
    )
    row = steps.rows(1)[0]
    take = functools.partial(step.train_step, learner)
    every = jax.jit(jax.vmap(take, in_axes=(0, None, 0, None)))
    _, together = every(states, teacher, data, row)
    for k, one in enumerate(made):
        _, alone = steps.one_step(one, row)
        np.testing.assert_allclose(together["loss"][k], alone["loss"], rtol=1e-3)


@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG) for n in STATEFUL])
def test_a_stop_loses_nothing_of_its_state(name, tmp_path, bench, teacher_dir):
    """Promise 12: memories, centres, margins and temperatures go on."""
    config = tiny.config(tmp_path, **fields(name))
    whole = resume.train(
        config, tmp_path / "a", bench, resume.interrupt.Guard(), teacher_dir
    )
    assert whole["method"] == name
    with pytest.raises(resume.interrupt.Interrupted):
        resume.train(config, tmp_path / "b", bench, tiny.StopAfter(23), teacher_dir)
    resume.train(config, tmp_path / "b", bench, resume.interrupt.Guard(), teacher_dir)
    one, other = (resume.finished(tmp_path / folder) for folder in "ab")
    resume.assert_equal_runs(one, other)


def test_features_of_two_shapes_are_told(tmp_path):
    learner, *_ = steps.make(tmp_path, 1, method="at")
    assert learner_lib.unlike(learner, 8) == []
    wide = dataclasses.replace(
        learner, teacher=models.create("resnet8x4", num_classes=3)
    )
    assert learner_lib.unlike(wide, 8)[0] == "stage1.block1 8x8x16 from 8x8x64"
    larger = dataclasses.replace(learner.teacher_pixels, size=16)
    large = dataclasses.replace(learner, teacher_pixels=larger)
    assert learner_lib.unlike(large, 8)[2] == "stage3.block1 2x2x64 from 4x4x64"
    blind = dataclasses.replace(wide, facts=distill.facts("kd"))
    assert learner_lib.unlike(blind, 8) == []
