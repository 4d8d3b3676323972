"""Tests that the fused, dispatch and pipeline engines make the same steps."""

import dataclasses
import functools

import jax
import pytest
import test_train_step as steps
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import engine as engine_lib
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
        ("dispatch", "blocks", 1),
        ("dispatch", "pooled", 1),
        ("dispatch", "unlike", 1),
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
