"""Tests that a batch in several parts gives the mean of their gradients."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_collections
import test_train_engines as engines
import test_train_step as steps
import tiny

from lakd_jax import errors
from lakd_jax.config import check
from lakd_jax.runs import checks
from lakd_jax.runtime import backend
from lakd_jax.training import step, teacher_outputs

LONG = pytest.mark.long
SGD = {"optim__momentum": 0.0, "optim__weight_decay": 0.0, "optim__warmup_epochs": 0.0}


def in_parts(setting, parts):
    """Returns the setting of steps whose batches are processed in `parts` parts."""
    spec, *rest = setting
    return dataclasses.replace(spec, accumulate=parts), *rest


def step_lengths(after, before):
    return jax.tree.map(np.subtract, after.params, before.params)


@LONG
def test_without_batch_norm_parts_are_the_whole_batch(tmp_path):
    """With the stored outputs of a teacher, whose rows must go with the examples."""
    spec, state, _, data = steps.small(
        tmp_path, 1, test_collections.GROUP, method="kd", optim__lr=1.0, **SGD
    )
    logits = 3 * np.random.default_rng(1).standard_normal((1, 160, 3))
    stored = teacher_outputs.TeacherOutputs(logits.astype(np.float32), ())
    setting = dataclasses.replace(spec, views=1), state, stored, data
    row = steps.rows(1)
    ((whole, expected),), ((ours, metrics),) = (
        steps.train(in_parts(setting, parts), row) for parts in (1, 2)
    )
    moved, wanted = (step_lengths(after, state) for after in (ours, whole))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    steps.assert_close(moved, wanted, rtol=1e-5, atol=1e-6 * largest)
    steps.assert_same_metrics(metrics, expected, rtol=1e-5)


@pytest.mark.parametrize("looped", [False, True])
def test_a_step_is_the_mean_of_its_parts(looped, tmp_path, monkeypatch):
    """With batch norm: statistics are those of each part, and move once for each.

    On accelerators the parts are a loop.
    """
    if looped:
        monkeypatch.setattr(backend, "on_cpu", lambda mesh: False)
    setting = steps.small(tmp_path, 1, method="none", optim__lr=1.0, **SGD)
    _, state, _, _ = setting
    (row,) = steps.rows(1)
    ((ours, metrics),) = steps.train(in_parts(setting, 2), [row])
    program = jax.jit(functools.partial(step.train_step, setting[0]))
    collections, moved, losses = state.collections, [], []
    for part in (row[0::2], row[1::2]):
        before = dataclasses.replace(state, collections=collections)
        after, values = program(before, *setting[2:], part)
        collections = after.collections
        moved.append(step_lengths(after, state))
        losses.append(values["loss"])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *moved)
    steps.assert_close(step_lengths(ours, state), mean, rtol=1e-4, atol=1e-6)
    steps.assert_close(ours.collections, collections, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert int(ours.step) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a cached function that runs two steps of an engine, in two parts."""
    folder = tmp_path_factory.mktemp("parts")

    @functools.cache
    def run(kind, devices=1):
        setting = steps.small(folder, devices, method="lakd", optim__accumulate=2)
        engine = engines.engine(kind, setting, folder)
        metrics = [engine.read(engine.run(row[None])) for row in steps.rows(2)]
        return jax.device_get(engine.state()), metrics

    return run


@LONG
@pytest.mark.parametrize(
    ("kind", "devices"), [("dispatch", 1), ("pipeline", 3), ("fused", 8)]
)
def test_engines_accumulate_alike(kind, devices, trained):
    (ours, metrics), (fused, expected) = trained(kind, devices), trained("fused")
    for one, other in zip(metrics, expected, strict=True):
        steps.assert_same_metrics(one, other)
    steps.assert_close(ours, fused, rtol=2e-4, atol=2e-6)


@LONG
def test_parts_take_less_memory(tmp_path):
    """A program holds the activations of one part, next to the images of all."""
    spec, *arguments = steps.small(tmp_path, 1, method="none")
    (row,), sizes = steps.rows(1, 64), {}
    for parts in (1, 4):
        changed = dataclasses.replace(spec, accumulate=parts)
        program = jax.jit(functools.partial(step.train_step, changed))
        memory = program.lower(*arguments, row).compile().memory_analysis()
        sizes[parts] = memory.temp_size_in_bytes
    assert sizes[4] < 0.75 * sizes[1]


@pytest.mark.parametrize(
    "fields",
    [{"optim__dot_delta": 0.09}, {"method": "deepkd"}, {"optim__ema": 0.9}],
)
def test_other_options_go_with_it(fields, tmp_path):
    """Traced only: what is accumulated has the structure that the optimiser takes."""
    fields = {"method": "kd", "optim__accumulate": 4} | fields
    setting = steps.small(tmp_path, 1, **fields)
    spec, *arguments = setting
    function = functools.partial(step.train_step, spec)
    state, metrics = jax.eval_shape(function, *arguments, steps.rows(1)[0])
    assert jax.tree.structure(state) == jax.tree.structure(setting[1])
    assert metrics["accuracy"].shape == ()
    assert bool(spec.momenta) == ("optim__ema" not in fields)
    if spec.momenta:
        names = tuple(group.name for group in spec.momenta)
        assert state.opt_state[0]._fields == names


@pytest.mark.parametrize(
    ("fields", "devices", "says"),
    [
        ({"optim__accumulate": 3}, 1, "(16) does not divide into as many parts; use"),
        ({"optim__accumulate": 4}, 8, "parts for 8 devices; use a multiple of 32"),
        (
            {"optim__accumulate": 16, "method": "rkd"},
            1,
            "is 16 in 16 parts (optim.accumulate), but method rkd",
        ),
    ],
)
def test_parts_that_cannot_be_are_rejected(fields, devices, says, tmp_path):
    config = tiny.config(tmp_path, **({"method": "kd"} | fields))
    (line,) = check.problems(config, devices)
    assert says in line


def test_a_last_batch_must_divide(tmp_path):
    fields = {"method": "rtk", "optim__accumulate": 4}
    config = tiny.config(tmp_path, **fields)
    for left, says in ((6, "a multiple of 4"), (4, "of 4, at least 8: set data.drop")):
        with pytest.raises(errors.ConfigError, match=f"leaves {left} of .*{says}"):
            checks.last_batch(config, 32 + left)
    checks.last_batch(config, 32)
    checks.last_batch(config, 40)
    dropped = tiny.config(tmp_path, **fields, data__drop_last=True)
    checks.last_batch(dropped, 38)
