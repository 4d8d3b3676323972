"""Tests that the fused, dispatch and pipeline engines make the same steps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_train_step as steps
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax.runtime import backend, interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import engine as engine_lib
from lakd_jax.training import record as record_lib
from lakd_jax.training import setup

LONG = pytest.mark.long
BLOCKS = functools.partial(tiny.SMALL, stage_sizes=(3, 1), widths=(4, 4))
POOLED = functools.partial(tiny.SMALL, stage_sizes=(2, 2, 1), widths=(4, 4, 4))
SHAPES = {
    "stages": {},
    # Four modules, of which the second and the third are identical.
    "blocks": {"network": BLOCKS, "local__granularity": "block"},
    # Modules 2 and 3 have equal variables, but only the third pools its input.
    "pooled": {"network": POOLED, "local__granularity": "block"},
    "fed": {"local__module_input": "teacher"},
    # The teacher's modules end inside its stages.
    "unlike": {"teacher_network": toys.Flat},
}


def engine(kind, setting, tmp_path):
    """Returns an engine with a copy of the first state of `setting`."""
    spec, state, teacher, data = setting
    config = tiny.config(tmp_path, method="lakd", local__engine=kind)
    run = setup.engine(config, spec, teacher, data, interrupt.Guard())
    run.load(mesh_lib.replicate(state, spec.mesh))
    return run


@dataclasses.dataclass
class Trained:
    """An engine after some steps, with the state and the metrics after each step."""

    engine: engine_lib.Engine
    states: list
    metrics: list


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a cached function that runs three steps of an engine."""
    folder = tmp_path_factory.mktemp("engines")

    @functools.cache
    def setting(shape, devices):
        return steps.small(folder, devices, method="lakd", **SHAPES[shape])

    @functools.cache
    def run(kind, shape="stages", devices=1):
        result = Trained(engine(kind, setting(shape, devices), folder), [], [])
        for row in steps.rows(3):
            result.metrics.append(result.engine.read(result.engine.run(row[None])))
            result.states.append(jax.device_get(result.engine.state()))
        return result

    return run


@pytest.mark.parametrize(
    ("kind", "shape", "devices"),
    [
        ("dispatch", "stages", 1),
        pytest.param("dispatch", "blocks", 1, marks=LONG),
        pytest.param("dispatch", "pooled", 1, marks=LONG),
        pytest.param("dispatch", "unlike", 1, marks=LONG),
        pytest.param("dispatch", "fed", 1, marks=LONG),
        pytest.param("pipeline", "blocks", 3, marks=LONG),
        pytest.param("pipeline", "fed", 3, marks=LONG),
        pytest.param("pipeline", "unlike", 3, marks=LONG),
    ],
)
def test_engines_train_alike(kind, shape, devices, trained):
    # Property 16 of LAKD: one program per module makes the same step as `fused`.
    ours, fused = trained(kind, shape, devices), trained("fused", shape)
    for metrics, expected in zip(ours.metrics, fused.metrics, strict=True):
        steps.assert_same_metrics(metrics, expected)
    steps.assert_close(ours.states[-1], fused.states[-1], rtol=2e-4, atol=2e-6)


def test_pipeline_equals_sequential_modules_bit_for_bit(trained):
    # Property 5 of LAKD: module k processes batch t after exactly t updates.
    pipeline, sequential = trained("pipeline", devices=3), trained("dispatch")
    steps.assert_close(pipeline.states[-1], sequential.states[-1], rtol=0, atol=0)


def test_pipeline_keeps_each_module_on_its_device(trained):
    pipeline = trained("pipeline", devices=3).engine
    homes = [
        {d.id for x in jax.tree.leaves(s.params) for d in x.devices()}
        for s in pipeline._states
    ]
    assert homes == [{0}, {1}, {2}]
    ids = {d.id for d in jax.tree.leaves(pipeline.state().params)[0].devices()}
    assert ids == {0, 1, 2}


def test_two_devices_share_three_modules(tmp_path):
    setting = steps.small(tmp_path, 2, method="lakd")
    pipeline = engine("pipeline", setting, tmp_path)
    homes = [mesh.devices.item().id for mesh in pipeline._meshes]
    assert homes == [0, 0, 1]


@LONG
def test_training_on_several_devices_equals_training_on_one(trained):
    eight, one = trained("dispatch", devices=8), trained("dispatch")
    steps.assert_close(eight.states[-1].params, one.states[-1].params, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "modules", "different"), [("blocks", 4, 3), ("pooled", 5, 5)]
)
def test_identical_modules_share_a_program(shape, modules, different, trained):
    ((_, programs),) = trained("dispatch", shape).engine._programs.values()
    assert len(programs) == modules
    assert len({id(program) for program in programs}) == different


def test_interdependent_modules_are_rejected(tmp_path):
    fields = {"method": "lakd", "local__cut_scale": 0.5}
    spec, *_ = steps.spec_of(tmp_path, 1, **fields)
    with pytest.raises(ValueError, match="local.engine=fused"):
        engine_lib.Modules(spec, None, None, interrupt.Guard())


def test_costs_are_those_of_the_step(trained):
    dispatch, fused = (trained(kind).engine.costs() for kind in ("dispatch", "fused"))
    assert dispatch.flops == pytest.approx(fused.flops, rel=0.2)
    assert 0 < dispatch.temporary < fused.temporary
    assert config_lib.default().local.engine == "fused"


def test_one_program_runs_any_number_of_steps(tmp_path, monkeypatch, trained):
    """As on accelerators: a loop, whose length is an argument."""
    alone = trained("fused")  # first, so that its programs are not counted
    compiled = []
    counted = backend.compiled
    monkeypatch.setattr(backend, "on_cpu", lambda mesh: False)
    monkeypatch.setattr(
        backend, "compiled", lambda *a: compiled.append(1) or counted(*a)
    )
    setting = steps.small(tmp_path, 1, method="lakd")
    config = tiny.config(tmp_path, method="lakd")
    arguments = (config, setting[0], *setting[2:], interrupt.Guard())
    run = setup.engine(*arguments, most=3)
    run.load(mesh_lib.replicate(setting[1], setting[0].mesh))
    assert [run.together(n) for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
    rows, losses = steps.rows(3), []
    for part in (rows[:1], rows[1:]):
        losses += run.read(run.run(part))["loss"].tolist()
    expected = [m["loss"][0] for m in alone.metrics]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    steps.assert_close(run.state().params, alone.states[-1].params, atol=2e-5)
    assert len(compiled) == 1


def test_an_unrolled_program_runs_its_number_of_steps_or_one(tmp_path):
    spec, *_ = steps.spec_of(tmp_path, 1, method="lakd")
    run = engine_lib.Fused(spec, None, None, interrupt.Guard(), most=3)
    assert [run.together(n) for n in (1, 2, 3, 9)] == [1, 1, 3, 3]


def test_batches_of_one_size_are_run_together(tmp_path):
    """The short last batch of an epoch is not one of them."""
    plan = functools.partial(
        record_lib.Plan,
        batch_size=4,
        epochs=2,
        log_every=9,
        eval_every=1,
        save_every=9,
        steps_per_dispatch=9,
        keep=1,
    )
    for examples, drop_last, expected in (
        (20, False, [5, 2, 1]),
        (22, False, [5, 2, 1, 1]),
        (22, True, [5, 2, 1]),
    ):
        made = plan(examples=examples, drop_last=drop_last)
        record = record_lib.RunRecord(made, tmp_path, 0, None, None, None)
        last = made.steps_per_epoch
        starts = (0, 3, 4, 5)[: len(expected)]
        assert [record.alike(at, last) for at in starts] == expected
        assert record.rows(0, record.alike(0, last)).shape == (5, 4)
