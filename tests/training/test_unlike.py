"""One step of every method on networks of other depths, stages, sizes and signs.

A CNN of three stages, whose maps shrink, and one of two with maps of 3x3, which are no
multiple or part of the others: blocks 1, 2, 3 are compared with 2, 3, 5 and back.
"""

import functools

import jax
import numpy as np
import pytest
import test_train_step as steps
import tiny
import toys

from lakd_jax import distill
from lakd_jax.local import pairing
from lakd_jax.models import chain

CNN = functools.partial(tiny.SMALL, widths=(4, 4, 4))  # some need equal widths
FLAT = toys.Flat
NETWORKS = {"to_cnn": (CNN, FLAT), "to_flat": (FLAT, CNN)}  # student, teacher

# DeiT's is for students with two heads, see test_transformers.py, and SimKD's for those
# with a projector, see test_simkd.py.
OTHERS = ("none", "deit", "simkd")
METHODS = [name for name in distill.names() if name not in OTHERS]
STAGED = [name for name in METHODS if distill.facts(name).staged]
FIELDS = {"crd": {"crd__negatives": 8}}
# Modules that have no term, so that nothing trains them if the student is cut.
IDLE = {"fitnet": {1}, "fsp": set()}
READINGS = {
    name: {"lakd__" + option: value for option, value in options.items()}
    for name, options in toys.READINGS.items()
    if name != "default"
} | {"preact": {"lakd__preact": True}, "global": {"lakd__att_global": True}}
BOTH = ("logits", "teacher_suffix")  # they resize the student's map to the teacher's

LONG = pytest.mark.long
QUICK = (("at", "to_cnn", 0.0), ("review", "to_flat", 0.0))


def step_of(tmp_path, method, direction, cut_scale, **fields):
    """Returns the spec and the metrics of a step; its new parameters are finite."""
    student, teacher = NETWORKS[direction]
    fields = FIELDS.get(method, {}) | fields
    setting = steps.small(
        *(tmp_path, 1, student),
        teacher_network=teacher,
        method=method,
        local__cut_scale=cut_scale,
        **fields,
    )
    ((state, metrics),) = steps.train(setting, steps.rows(1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    return setting[0], metrics


def cases():
    """Returns (method, direction, cut scale): cut in both directions if it can be.

    The cut changes which gradients pass and nothing else, so few are also run uncut.
    """
    whole = [(name, "to_cnn", 1.0) for name in METHODS if name not in STAGED]
    cut = [(name, direction, 0.0) for name in STAGED for direction in NETWORKS]
    uncut = [("lakd", "to_flat", 1.0), ("review", "to_cnn", 1.0)]
    found = [*whole, *cut, *uncut]
    return [
        case if case in QUICK else pytest.param(*case, marks=LONG) for case in found
    ]


@pytest.mark.parametrize(("method", "direction", "cut_scale"), cases())
def test_every_method_trains_unlike_networks(method, direction, cut_scale, tmp_path):
    spec, metrics = step_of(tmp_path, method, direction, cut_scale)
    assert np.isfinite(metrics["loss"]) and metrics["loss"] != 0
    modules = range(1, len(spec.partition.names) + 1)
    if method in STAGED:
        assert len(modules) == (3 if direction == "to_cnn" else 2)
    idle = IDLE.get(method, set()) if cut_scale == 0 else set()
    still = {k for k in modules if metrics[f"module{k}/grad_norm"] == 0}
    assert still == idle


@pytest.mark.long
@pytest.mark.parametrize(
    ("reading", "direction"),
    [
        *((name, "to_cnn") for name in READINGS),
        *((name, "to_flat") for name in BOTH),
    ],
)
def test_every_reading_of_lakd_trains_unlike_networks(reading, direction, tmp_path):
    spec, metrics = step_of(tmp_path, "lakd", direction, 0.0, **READINGS[reading])
    assert np.isfinite(metrics["loss"])
    for k in range(1, len(spec.partition.names) + 1):
        assert metrics[f"module{k}/grad_norm"] > 0


def test_the_two_are_unlike():
    """In what the module's docstring says; or the tests above show nothing."""
    cnn, flat = CNN(num_classes=3), FLAT(num_classes=3)
    pairs = pairing.of_stages(cnn, flat)
    assert list(pairs.values()) == ["stage1.block2", "stage1.block3", "stage2.block2"]
    assert [*pairing.of_stages(flat, cnn).values()] == [
        "stage2.block1",
        "stage3.block1",
    ]
    shapes = [
        chain.joint_shapes(cnn, list(pairs), 8),
        chain.joint_shapes(flat, list(pairs.values()), 8),
    ]
    assert [[shape[1] for shape in one] for one in shapes] == [[4, 2, 2], [3, 3, 3]]
