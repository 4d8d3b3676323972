"""Modules one by one: the same training as one gradient of the summed loss."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
import test_train_step as steps
import tiny

from lakd_jax.training import modules, step

READINGS = {
    "default": {},
    "map": {"lakd.attention": "map"},
    "logits": {"lakd.attention": "logits"},
    "aux_heads": {"lakd.task": "aux_heads", "lakd.head_loss": "ce"},
    "teacher_suffix": {"lakd.task": "teacher_suffix", "lakd.head_loss": "ce"},
    "preact": {"lakd.preact": True},
    "shape": {"lakd.adapter": "shape"},
    "teacher_input": {"local.module_input": "teacher"},
    "preact_fed": {"lakd.preact": True, "local.module_input": "teacher"},
    "clipped": {"optim.clip_norm": 0.1},
    "late": {"local.module_start_epochs": (0.0, 0.05, 0.1)},
    "several": {
        "lakd.preact": True,
        "local.module_input": "teacher",
        "lakd.task": "aux_heads",
        "lakd.head_loss": "ce",
        "optim.clip_norm": 0.1,
    },
}
QUICK = ("default", "several")


def both_ways(made, row):
    """(state, metrics) of two steps, module by module and by one gradient."""
    learner, state, teacher, data = made
    assert learner.isolated
    results = []
    for take in (modules.isolated_step, step.whole_step):
        program, now = jax.jit(functools.partial(take, learner)), state
        for _ in range(2):
            now, metrics = program(now, teacher, data, row)
        results.append((now, metrics))
    return results


@pytest.mark.parametrize(
    "reading",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in READINGS],
)
def test_isolated_step_is_the_step_of_the_sum(reading, lakd, tmp_path):
    made = lakd
    if fields := READINGS[reading]:
        made = steps.small(tmp_path, 1, method="lakd", **fields)
    (ours, metrics), (whole, expected) = both_ways(made, steps.rows(1)[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
        ours,
        whole,
    )
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def lakd(tmp_path_factory):
    return steps.small(tmp_path_factory.mktemp("lakd"), 1, method="lakd")


def test_a_module_follows_its_own_loss(lakd):
    learner, state, teacher, data = lakd
    below, labels, noise = modules.start(learner, state.step, data, steps.rows(1)[0])

    def first_module(learner):
        own = modules.module_state(learner, state, 0)
        part = modules.teacher_part(learner, teacher, 0)
        program = jax.jit(functools.partial(modules.module_step, learner, 0))
        new, *_ = program(own, part, below, labels, noise)
        return new.params

    heavier = learner.method.options
    heavier = dataclasses.replace(heavier, feature_weight=7.0)
    other = dataclasses.replace(learner, method=type(learner.method)(heavier))
    same, changed = first_module(learner), first_module(other)
    kernel = "student", "stem", "conv1", "kernel"
    same, changed = (functools.reduce(dict.get, kernel, p) for p in (same, changed))
    assert np.abs(same - changed).max() > 0


def test_states_of_modules_are_the_whole_and_share_nothing(lakd):
    learner, state, _, _ = lakd
    parts = [modules.module_state(learner, state, k) for k in range(3)]
    counts = [len(jax.tree.leaves(p.params)) for p in parts]
    assert sum(counts) == len(jax.tree.leaves(state.params)) and min(counts) > 0
    joined = modules.rearranged(state, *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, state)
    with pytest.raises(KeyError):
        modules.rearranged(state, *parts[:2])


def test_a_module_needs_only_its_own_part_of_the_teacher(lakd, tmp_path):
    learner, _, teacher, _ = lakd
    parts = [modules.teacher_part(learner, teacher, k) for k in range(3)]
    assert [set(p["params"]) for p in parts] == [
        {"stem", "stage1"},
        {"stage2"},
        {"stage3", "head"},
    ]
    fields = {"method": "lakd", "lakd.task": "teacher_suffix"}
    learner, _, teacher, _ = steps.small(tmp_path, 1, **fields)
    assert "head" in modules.teacher_part(learner, teacher, 1)["params"]


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, "isolated_step"),
        ({"local.cut_scale": 0.5}, "whole_step"),
        ({"lakd.att_global": True}, "whole_step"),
        ({"lakd.task": "aux_heads"}, "whole_step"),
        ({"method": "kd"}, "whole_step"),
        ({"method": "none"}, "whole_step"),
    ],
)
def test_what_crosses_a_cut_is_not_run_module_by_module(
    fields, taken, tmp_path, monkeypatch
):
    for module, name in ((modules, "isolated_step"), (step, "whole_step")):
        monkeypatch.setattr(module, name, lambda *_, name=name: name)
    learner, _, teacher = steps.learner_of(tmp_path, 1, tiny.SMALL, **fields)
    state = types.SimpleNamespace(step=0)
    assert step.train_step(learner, state, teacher, None, steps.rows(1)[0]) == taken
