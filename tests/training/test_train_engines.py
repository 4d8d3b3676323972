"""Engines: one program, a program a module, a pipeline; the same steps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_train_step as steps
import tiny

from lakd_jax import config as config_lib
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import engine as engine_lib
from lakd_jax.training import setup

LONG = pytest.mark.long
BLOCKS = functools.partial(tiny.SMALL, stage_sizes=(3, 1), widths=(4, 4))
SHAPES = {
    "stages": {},
    # Four modules, of which the second and the third are alike.
    "blocks": {"network": BLOCKS, "local__granularity": "block"},
    "fed": {"local__module_input": "teacher"},
}


def engine(kind, made, tmp_path):
    """An engine with a copy of the first state of `made`."""
    spec, state, teacher, data = made
    config = tiny.config(tmp_path, method="lakd", local__engine=kind)
    run = setup.engine(config, spec, teacher, data, interrupt.Guard())
    run.load(mesh_lib.replicate(state, spec.mesh))
    return run


@dataclasses.dataclass
class Trained:
    """An engine after some steps, the state after each, and the metrics of each."""

    engine: engine_lib.Engine
    states: list
    metrics: list


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps of an engine on some devices, once each."""
    folder = tmp_path_factory.mktemp("engines")

    @functools.cache
    def made(shape, devices):
        settings = {"network": tiny.SMALL, "method": "lakd"} | SHAPES[shape]
        return steps.make(folder, devices, **settings)

    @functools.cache
    def run(kind, shape="stages", devices=1):
        own = Trained(engine(kind, made(shape, devices), folder), [], [])
        for row in steps.rows(3):
            own.metrics.append(own.engine.read(own.engine.run(row[None])))
            own.states.append(jax.device_get(own.engine.state()))
        return own

    return run


def assert_same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
    ("kind", "shape", "devices"),
    [
        ("dispatch", "stages", 1),
        ("dispatch", "blocks", 1),
        pytest.param("dispatch", "fed", 1, marks=LONG),
        pytest.param("pipeline", "blocks", 3, marks=LONG),
        pytest.param("pipeline", "fed", 3, marks=LONG),
    ],
)
def test_engines_train_alike(kind, shape, devices, trained):
    # Property 16 of LAKD: a program a module makes the fused step.
    ours, fused = trained(kind, shape, devices), trained("fused", shape)
    for told, expected in zip(ours.metrics, fused.metrics, strict=True):
        assert told.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(told[name], value, rtol=2e-4, err_msg=name)
    assert_same(ours.states[-1], fused.states[-1], rtol=2e-4, atol=2e-6)


def test_pipeline_is_the_sequence_bit_for_bit(trained):
    # Property 5 of LAKD: module k meets batch t after exactly t updates.
    pipeline, sequence = trained("pipeline", devices=3), trained("dispatch")
    assert_same(pipeline.states[-1], sequence.states[-1], rtol=0, atol=0)


def test_pipeline_keeps_each_module_on_its_device(trained):
    made = trained("pipeline", devices=3).engine
    homes = [
        {d.id for x in jax.tree.leaves(s.params) for d in x.devices()}
        for s in made._states
    ]
    assert homes == [{0}, {1}, {2}]
    everywhere = {d.id for d in jax.tree.leaves(made.state().params)[0].devices()}
    assert everywhere == {0, 1, 2}


def test_two_devices_share_three_modules(tmp_path):
    made = steps.small(tmp_path, 2, method="lakd")
    homes = [m.devices.item().id for m in engine("pipeline", made, tmp_path)._meshes]
    assert homes == [0, 0, 1]


@LONG
def test_batch_split_over_devices_trains_as_on_one(trained):
    eight, one = trained("dispatch", devices=8), trained("dispatch")
    assert_same(eight.states[-1].params, one.states[-1].params, atol=2e-5)


def test_modules_that_are_alike_share_a_program(trained):
    ((_, programs),) = trained("dispatch", "blocks").engine._programs.values()
    assert len(programs) == 4
    assert len({id(program) for program in programs}) == 3


def test_running_statistics_move_once_a_step(trained):
    # Property 17 of LAKD, of the dispatched engine.
    ours, fused = trained("dispatch").states[0], trained("fused").states[0]
    assert_same(ours.collections, fused.collections, rtol=1e-4, atol=1e-6)


def test_modules_that_need_each_other_are_refused(tmp_path):
    fields = {"method": "lakd", "local__cut_scale": 0.5}
    spec, *_ = steps.spec_of(tmp_path, 1, tiny.SMALL, **fields)
    with pytest.raises(ValueError, match="local.engine=fused"):
        engine_lib.Modules(spec, None, None, interrupt.Guard())


def test_costs_are_of_the_step(trained):
    made, fused = (trained(kind).engine.costs() for kind in ("dispatch", "fused"))
    assert made.flops == pytest.approx(fused.flops, rel=0.2)
    assert 0 < made.temporary < fused.temporary
    assert config_lib.default().local.engine == "fused"
