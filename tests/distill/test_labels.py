"""Tests the labels' part of the losses: hard, smoothed and mixed, in every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_step as steps
import toys

from lakd_jax import distill
from lakd_jax.distill import kd
from lakd_jax.distill.base import labels, method
from lakd_jax.training import state as state_lib
from lakd_jax.training import step

QUICK = ("none", "lakd", "dkd")
LABELS = np.array([0, 2, 1, 2])
TARGETS = 0.9 * np.eye(3, dtype=np.float32)[LABELS] + np.float32(0.1 / 3)


class Unread:
    """Labels that nothing may read."""

    def __getattr__(self, name):
        raise RuntimeError(f"labels are read: {name}")

    def __eq__(self, other):
        raise RuntimeError("labels are compared")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


def test_soft_labels_by_hand():
    logits = toys.noise(0, 4, 3)
    log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    found = labels.soft_cross_entropy(logits.astype(jnp.bfloat16), TARGETS)
    assert found.dtype == jnp.float32
    found = labels.soft_cross_entropy(logits, TARGETS)
    np.testing.assert_allclose(found, -np.sum(TARGETS * log_p, -1).mean(), rtol=1e-6)
    smoothed = labels.smoothed_cross_entropy(logits, LABELS, 0.1)
    np.testing.assert_allclose(found, smoothed, rtol=1e-6)


def test_which_cross_entropy():
    logits = toys.noise(0, 4, 3)
    seen = functools.partial(toys.signals, toys.outputs(logits), None, LABELS)
    assert seen().cross_entropy(logits) == kd.cross_entropy(logits, LABELS)
    smoothed = kd.smoothed_cross_entropy(logits, LABELS, 0.1)
    assert seen(label_smoothing=0.1).cross_entropy(logits) == smoothed
    mixed = labels.soft_cross_entropy(logits, TARGETS)
    assert seen(soft_labels=TARGETS).cross_entropy(logits) == mixed


def test_the_step_smooths_the_labels(folder):
    spec, _, teacher = steps.spec_of(folder, 1, method="at", label_smoothing=0.1)
    seen = {}

    def keep(signals, params):
        seen["smoothing"] = signals.label_smoothing
        return signals.labels

    _traced(spec, teacher, keep)
    assert seen == {"smoothing": 0.1}


# DeiT's is for students with two heads; test_deit.py gives it soft labels. SimKD's is
# for students with a projector, and has no term of the labels.
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
        for name in distill.names()
        if name not in ("deit", "simkd")
    ],
)
def test_methods_that_do_not_declare_it_read_no_labels(name, folder):
    """Nor do they compute a cross-entropy that is not smoothed, or not mixed."""
    spec, _, teacher = steps.spec_of(folder, 1, method=name)
    unread = {"labels": Unread(), "soft_labels": jnp.full((2, 3), 1 / 3)}

    def losses(signals, key):
        signals = dataclasses.replace(signals, **unread)
        return spec.method.init_with_output(key, signals, train=True)[0]

    if distill.facts(name).reads_labels:
        with pytest.raises(RuntimeError, match="labels are"):
            _traced(spec, teacher, losses)
    else:
        assert any("head_ce" in loss.terms for loss in _traced(spec, teacher, losses))


def test_a_method_reads_labels_unless_it_says_otherwise():
    assert method.Method.reads_labels
    assert distill.facts("at+dkd").reads_labels
    assert not distill.facts("at+kd").reads_labels


def _traced(spec, teacher, function):
    """Traces `function` of the step's signals and a key; nothing is computed."""
    images, key = jnp.zeros((2, 8, 8, 3), jnp.uint8), jax.random.key(0)

    def run(teacher):
        variables = spec.student.init(key, spec.student_pixels(images), train=False)
        kinds = {kind: {"student": x, "method": {}} for kind, x in variables.items()}
        state = state_lib.TrainState(jnp.int32(0), kinds.pop("params"), kinds, ())
        given = (images, jnp.zeros(2, jnp.int32), key)
        return function(step.first_signals(spec, state, teacher, *given), key)

    return jax.eval_shape(run, teacher)
