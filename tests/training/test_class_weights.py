"""Weights of the labels' cross-entropy per class: optim.class_weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_train_step as steps
import tiny

from lakd_jax import config as config_lib
from lakd_jax import errors
from lakd_jax.config import check, resolved
from lakd_jax.distill import kd
from lakd_jax.distill.base import method
from lakd_jax.models import chain
from lakd_jax.training import setup, step

LOGITS = np.random.default_rng(0).normal(0, 1, (4, 3)).astype(np.float32)
LABELS = np.array([0, 1, 1, 2], np.int32)
WEIGHTS = np.array([1.0, 0.5, 4.0], np.float32)


def of(**optim):
    changes = {f"optim.{name}": value for name, value in optim.items()}
    return config_lib.changed(config_lib.default(), changes)


def test_cross_entropy_is_the_weighted_mean():
    losses = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    expected = (losses[0] + 0.5 * (losses[1] + losses[2]) + 4 * losses[3]) / 6
    found = kd.cross_entropy(jnp.asarray(LOGITS), LABELS, WEIGHTS[LABELS])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["none", "kd", "dkd", "nkd+dist", "lakd"])
def test_every_labels_loss_is_weighted(name):
    config = resolved.resolve(config_lib.changed(of(), {"method": name}))
    made = setup._method(config)
    outputs = chain.Outputs(jnp.asarray(LOGITS), None, (), (), (), None, ())
    maps = tuple(jnp.asarray(np.ones((4, 2, 2, 3), np.float32)) for _ in range(1))
    signals = method.Signals(
        student=outputs,
        teacher=outputs,
        labels=jnp.asarray(LABELS),
        epoch=jnp.float32(50),
        student_joints=maps,
        teacher_joints=maps,
        label_weights=jnp.asarray(WEIGHTS)[LABELS],
    )
    variables = made.init(jax.random.key(0), signals, train=True)
    losses, _ = made.apply(variables, signals, train=True, mutable=["batch_stats"])
    expected = kd.cross_entropy(jnp.asarray(LOGITS), LABELS, WEIGHTS[LABELS])
    np.testing.assert_allclose(losses[-1].terms["head_ce"], expected, rtol=1e-6)


def test_balanced_weights_are_inverse_to_the_sizes():
    labels = np.repeat([0, 1, 2], [6, 3, 3])
    config = resolved.resolve(of(class_weights="balanced"))
    found = setup.class_weights(config, labels, 3)
    np.testing.assert_allclose(found, [2 / 3, 4 / 3, 4 / 3])
    assert np.mean(np.array(found)[labels]) == pytest.approx(1)
    with pytest.raises(errors.ConfigError, match="needs the labels"):
        setup.class_weights(config, None, 3)


def test_weights_are_given_by_number():
    config = resolved.resolve(of(class_weights="1,2.5"))
    assert setup.class_weights(config, None, 2) == (1.0, 2.5)
    with pytest.raises(errors.ConfigError, match="2 weights for 3 classes"):
        setup.class_weights(config, None, 3)
    assert setup.class_weights(resolved.resolve(of()), None, 3) == ()


@pytest.mark.parametrize("value", ["ballanced", "1,-2", "1,", "inf", "0"])
def test_other_texts_are_refused(value):
    (line,) = check.problems(of(class_weights=value), 1)
    assert line.startswith("optim.class_weights must be balanced")


def test_what_it_does_not_go_with(tmp_path):
    fields = {"method": "kd", "label_smoothing": 0.1, "optim__class_weights": "1,2,3"}
    (line,) = check.problems(tiny.config(tmp_path, **fields), 1)
    assert "optim.class_weights does not go with label_smoothing=0.1" in line


@pytest.mark.long
@pytest.mark.parametrize(
    ("weights", "same"),
    [
        ((3.0, 3.0, 3.0), True),
        ((1.0, 2.0, 8.0), False),
    ],
)
def test_steps_use_them(weights, same, tmp_path):
    spec, state, teacher, data = steps.small(tmp_path, devices=1, method="kd")
    rows = np.arange(16, dtype=np.int32)
    losses = []
    for given in ((), weights):
        one = dataclasses.replace(spec, class_weights=given)
        _, metrics = step.train_step(one, state, teacher, data, rows)
        losses.append(metrics["module1/head_ce"])
    assert np.allclose(*losses, rtol=1e-5) == same
