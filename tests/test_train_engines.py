"""Engines: one program, a program a module, a pipeline; the same steps."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
import test_train_step as steps
import tiny

from lakd_jax import config as config_lib
from lakd_jax.train import build, engines, modules
from lakd_jax.train import state as state_lib

ENGINES = ("fused", "dispatch", "pipeline")


def engine(kind, tmp_path, devices=1, **fields):
    """A loaded engine and its learner; "__" for dots in `fields`."""
    made = steps.make(tmp_path, devices, method="lakd", **fields)
    learner, state, teacher, data = made
    config = tiny.config(tmp_path, method="lakd", local__engine=kind)
    run = build.engine(config, learner, teacher, data, lambda function: function())
    run.load(state)
    return run, learner


def train(kind, tmp_path, count=3, **options):
    """(state, metrics of the last step) after `count` steps."""
    made, _ = engine(kind, tmp_path, **options)
    for row in steps.rows(count):
        told = jax.device_get(made.run(row[None]))
    return made.state(), modules.together(told)


def assert_same(a, b, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **tolerance),
        jax.device_get(a),
        jax.device_get(b),
    )


@pytest.mark.parametrize("kind", ["dispatch", "pipeline"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"local__granularity": "block"},
        pytest.param({"local__module_input": "teacher"}, marks=pytest.mark.long),
    ],
    ids=["stage", "block", "teacher_input"],
)
def test_engines_train_alike(kind, fields, tmp_path):
    # Property 16 of LAKD: a program a module makes the fused step.
    devices = 3 if kind == "pipeline" else 1
    ours, told = train(kind, tmp_path, devices=devices, **fields)
    fused, expected = train("fused", tmp_path, **fields)
    assert told.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(told[name], value, rtol=2e-4, err_msg=name)
    assert_same(ours, fused, rtol=2e-4, atol=2e-6)


def test_pipeline_is_the_sequence_bit_for_bit(tmp_path):
    # Property 5 of LAKD: module k meets batch t after exactly t updates.
    pipeline, _ = train("pipeline", tmp_path, devices=3)
    sequence, _ = train("dispatch", tmp_path, devices=1)
    assert_same(pipeline, sequence, rtol=0, atol=0)


def test_pipeline_keeps_each_module_on_its_device(tmp_path):
    made, _ = engine("pipeline", tmp_path, devices=2)
    made.run(steps.rows(1))
    homes = [
        {d.id for x in jax.tree.leaves(s.params) for d in x.devices()}
        for s in made._states
    ]
    assert homes == [{0}, {0}, {1}]
    everywhere = {d.id for d in jax.tree.leaves(made.state().params)[0].devices()}
    assert everywhere == {0, 1}


@pytest.mark.long
def test_batch_split_over_devices_trains_as_on_one(tmp_path):
    eight, _ = train("dispatch", tmp_path, devices=8)
    one, _ = train("dispatch", tmp_path, devices=1)
    assert_same(eight.params, one.params, atol=2e-5)


@pytest.mark.long
def test_modules_that_are_alike_share_a_program(tmp_path):
    learner, state, teacher, data = longer(tmp_path)
    made = engines.Modules(learner, teacher, data, lambda function: function())
    made.load(state)
    made.run(steps.rows(1))
    ((_, programs),) = made._programs.values()
    assert len(programs) == 9
    # The first and the last, the two with a stride, and the blocks of each stage.
    assert len({id(program) for program in programs}) == 7


def longer(tmp_path):
    """As `steps.make`, resnet20 from resnet20, cut at every block."""
    fields = {"method": "lakd", "local__granularity": "block"}
    load = functools.partial(steps.networks.load)

    def other(part, name, *rest, **more):
        return load(part, "resnet20", *rest, **more)

    with mock.patch.object(steps.networks, "load", other):
        return steps.make(tmp_path, 1, **fields)


def test_shared_programs_train_each_module_with_its_own_weights(tmp_path):
    learner, state, teacher, data = longer(tmp_path)
    made = engines.Modules(learner, teacher, data, lambda function: function())
    fused = engines.Fused(learner, teacher, data, lambda function: function())
    copy = state_lib.replicate(state, learner.mesh)
    made.load(state)
    fused.load(copy)
    row = steps.rows(1)
    told = modules.together(jax.device_get(made.run(row)))
    expected = jax.device_get(fused.run(row))[0]
    assert told.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(told[name], value, rtol=5e-4, err_msg=name)
    assert_same(made.state(), fused.state(), rtol=1e-3, atol=1e-5)


def test_running_statistics_move_once_a_step(tmp_path):
    # Property 17 of LAKD, of the dispatched engine.
    ours, _ = train("dispatch", tmp_path, count=1)
    fused, _ = train("fused", tmp_path, count=1)
    assert_same(ours.batch_stats, fused.batch_stats, rtol=1e-4, atol=1e-6)


def test_modules_that_need_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="local.engine=fused"):
        engine("dispatch", tmp_path, local__cut_scale=0.5)


def test_costs_are_of_the_step(tmp_path):
    made, _ = engine("dispatch", tmp_path)
    fused, _ = engine("fused", tmp_path)
    for each in (made, fused):
        each.run(steps.rows(1))
    assert made.costs().flops == pytest.approx(fused.costs().flops, rel=0.2)
    assert 0 < made.costs().temporary < fused.costs().temporary
    assert config_lib.default().local.engine == "fused"
