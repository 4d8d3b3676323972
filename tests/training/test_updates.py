"""Tests `log_updates`: which kernels are measured, and that the numbers are right."""

import functools

import jax
import numpy as np
import pytest
import test_train_engines as engines
import test_train_step as steps
import tiny

from lakd_jax import models
from lakd_jax.models import chain
from lakd_jax.training import record as record_lib
from lakd_jax.training import state as state_lib
from lakd_jax.training import updates


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ("resnet8x4", (3, 3, 256, 256)),
        ("vgg8", (3, 3, 512, 512)),
        ("convnext_pico", (2048, 512)),  # fc2, as large as fc1
        ("efficientnet_b0", (1, 1, 1152, 320)),
    ],
)
def test_a_stage_is_represented_by_its_last_large_kernel(network, shape):
    model = models.create(network, num_classes=5)
    found = updates.kernels(model, chain.variable_shapes(model)["params"])
    stages = range(1, len(model.stage_sizes) + 1)
    assert list(found) == [f"stage{s}/update_norm" for s in stages]
    assert list(found.values())[-1].shape == shape


def test_a_part_of_the_network_has_its_stages_only():
    model = tiny.SMALL(num_classes=3)
    params = tiny.variables(model)["params"]
    part = {name: params[name] for name in ("stage2", "head")}
    assert list(updates.norms(model, part)) == ["stage2/update_norm"]


def test_distances_add_up_the_steps_of_every_line():
    name = updates.metric(1)
    records = [
        {"step": 4, "kind": "train", name: 0.5},  # 4 steps, 2.0
        {"step": 4, "kind": "eval", "accuracy": 0.1},
        {"step": 6, "kind": "train", name: 0.25},  # 2 steps, 2.5 in all
    ]
    found = updates.distances(records, name, [0, 2, 4, 5, 6])
    np.testing.assert_allclose(found, [0.0, 1.0, 2.0, 2.25, 2.5])
    assert updates.distances(records, updates.metric(2), [4]) is None


def test_metrics_are_divided_by_the_first_norm(tmp_path):
    model = tiny.SMALL(num_classes=3)
    params = jax.tree.map(np.zeros_like, tiny.variables(model)["params"])
    params["stage2"]["block1"]["conv"]["kernel"][0, 0, 0, :2] = 3.0, 4.0
    state = state_lib.TrainState(0, {"student": params, "method": {}}, {}, ())
    first = updates.first_norms(model, state)
    assert first == {updates.metric(1): 1.0, updates.metric(2): 5.0} | {
        updates.metric(3): 1.0
    }
    record = record_lib.RunRecord(None, tmp_path, 0, None, None, None)
    record._scales = {updates.metric(2): 5.0}
    record.note(0, {"loss": np.array([1.0, 2.0]), updates.metric(2): np.array([5, 1])})
    assert record.progress.window == [
        {"loss": 1.0, updates.metric(2): 1.0},
        {"loss": 2.0, updates.metric(2): 0.2},
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a cached function that runs two steps of an engine that logs updates."""
    folder = tmp_path_factory.mktemp("updates")
    # Of four modules, the second and the third have identical variables, and only the
    # third ends a stage.
    fields = {"method": "lakd", **engines.SHAPES["blocks"]}

    @functools.cache
    def run(kind, log_updates=True):
        setting = steps.small(folder, 1, log_updates=log_updates, **fields)
        engine = engines.engine(kind, setting, folder)
        states, metrics = [jax.device_get(engine.state())], []
        for row in steps.rows(2):
            metrics.append(engine.read(engine.run(row[None])))
            states.append(jax.device_get(engine.state()))
        return setting[0].student, states, metrics

    return run


@pytest.mark.parametrize(
    "kind", ["fused", pytest.param("dispatch", marks=pytest.mark.long)]
)
def test_logged_norms_are_those_of_the_updates(kind, trained):
    model, states, metrics = trained(kind)
    weights = [updates.kernels(model, s.params["student"]) for s in states]
    for step, found in enumerate(metrics):
        assert {n for n in found if n.startswith("stage")} == set(weights[0])
        for name, before in weights[step].items():
            change = np.linalg.norm((weights[step + 1][name] - before).ravel())
            np.testing.assert_allclose(found[name], [change], rtol=1e-3)


def test_logging_changes_no_update(trained):
    (_, logged, metrics), (_, plain, fewer) = trained("fused"), trained("fused", False)
    steps.assert_close(logged[-1].params, plain[-1].params, rtol=1e-5, atol=1e-7)
    added = set(metrics[0]) - set(fewer[0])
    assert added == {updates.metric(1), updates.metric(2)}
