"""Training modules one by one equals training with one gradient of the summed loss."""

import dataclasses

import jax
import numpy as np
import pytest
import test_train_step as steps
import tiny
import toys

from lakd_jax.training import segments

VARIANTS = {
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
    "unlike": {"teacher_network": toys.Flat, "lakd.preact": True},
    "several": {
        "lakd.preact": True,
        "local.module_input": "teacher",
        "lakd.task": "aux_heads",
        "lakd.head_loss": "ce",
        "optim.clip_norm": 0.1,
    },
}
QUICK = ("default",)


def both_ways(setting, row):
    """Returns (state, metrics) of two steps, per module and by a single gradient."""
    spec, state, teacher, data = setting
    joint = dataclasses.replace(spec, regularise=lambda losses, sown, epoch: losses)
    assert [len(segments.of_student(x)) for x in (spec, joint)] == [3, 1]
    return [
        steps.train((each, state, teacher, data), [row, row])[-1]
        for each in (spec, joint)
    ]


@pytest.mark.parametrize(
    "variant",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in VARIANTS],
)
def test_isolated_step_equals_the_step_of_the_summed_loss(variant, lakd, tmp_path):
    setting = lakd
    if fields := VARIANTS[variant]:
        setting = steps.small(tmp_path, 1, method="lakd", **fields)
    (isolated, metrics), (joint, expected) = both_ways(setting, steps.rows(1)[0])
    steps.assert_close(isolated, joint, rtol=1e-4, atol=2e-6)
    steps.assert_same_metrics(metrics, expected)


@pytest.fixture(scope="module")
def lakd(tmp_path_factory):
    return steps.small(tmp_path_factory.mktemp("lakd"), 1, method="lakd")


def parts_of(spec, state):
    """Returns (segment, its part of the state) of each segment."""
    return [(s, segments.state_of(spec, state, s)) for s in segments.of_student(spec)]


def test_module_states_partition_the_students_state(lakd):
    spec, state, _, _ = lakd
    parts = [part for _, part in parts_of(spec, state)]
    counts = [len(jax.tree.leaves(p.params)) for p in parts]
    assert sum(counts) == len(jax.tree.leaves(state.params)) and min(counts) > 0
    joined = segments.joined(state, *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, state)
    with pytest.raises(KeyError):
        segments.joined(state, *parts[:2])


def test_names_can_be_removed_and_restored(lakd):
    """Holds for parameters, momentum and statistics."""
    spec, state, _, _ = lakd
    for segment, part in parts_of(spec, state):
        names = segments.student_names(spec, segment)
        placed = segments.renamed_state(names.remove, part)
        assert "block1" not in str(jax.tree.structure(placed))
        restored = segments.renamed_state(names.restore, placed)
        jax.tree.map(np.testing.assert_array_equal, restored, part)
        assert jax.tree.structure(restored.params) == jax.tree.structure(part.params)
        leaves = [jax.tree.leaves(x.opt_state) for x in (placed, part)]
        assert len(leaves[0]) == len(leaves[1]) > 0


def test_units_are_in_network_order():
    """The order is not alphabetical, where block10 precedes block2."""
    units = tuple(f"stage1.block{k}" for k in range(1, 12))
    tree = {"stage1": {f"block{k}": {"w": np.float32(k)} for k in range(1, 12)}}
    placed = segments.Names(units).remove({"student": tree})
    assert [unit["w"] for unit in placed["units"]] == [*range(1, 12)]
    assert segments.Names(units).restore(placed)["student"] == tree
    with pytest.raises(KeyError, match="block11"):
        segments.Names(units[:-1]).remove({"student": tree})


def test_a_module_needs_only_its_part_of_the_teacher(lakd, tmp_path):
    spec, _, teacher, _ = lakd
    parts = [segments.teacher_of(spec, teacher, s) for s in segments.of_student(spec)]
    assert [set(p["params"]) for p in parts] == [
        {"stem", "stage1"},
        {"stage2"},
        {"stage3", "head"},
    ]
    fields = {"method": "lakd", "lakd.task": "teacher_suffix"}
    spec, _, teacher, _ = steps.small(tmp_path, 1, **fields)
    second = segments.teacher_of(spec, teacher, segments.Segment(1, 1))
    assert "head" in second["params"]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 3),
        ({"local.cut_scale": 0.5}, 1),
        ({"local.cut_end": 1.0}, 1),
        ({"lakd.att_global": True}, 1),
        ({"lakd.task": "aux_heads"}, 1),
        ({"method": "kd"}, 1),
        ({"method": "none"}, 1),
    ],
)
def test_the_student_is_one_segment_if_gradients_cross_cuts(fields, count, tmp_path):
    spec, *_ = steps.spec_of(tmp_path, 1, tiny.SMALL, **fields)
    assert len(segments.of_student(spec)) == count
