"""A short last batch that is filled up trains as the short one does, in one program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest
import test_train_engines as engines
import test_train_resume as resume
import test_train_step as steps
import test_transformers as transformers
import tiny
from flax import linen as nn

from lakd_jax import distill, models
from lakd_jax.config import resolved
from lakd_jax.data import order
from lakd_jax.models import masking
from lakd_jax.runtime import backend
from lakd_jax.training import record as record_lib
from lakd_jax.training import setup

LONG = pytest.mark.long
METHODS = [n for n in distill.names() if distill.facts(n).per_example]
# Options of LAKD that reduce in other places.
VARIANTS = {
    "map": {"lakd__attention": "map", "lakd__reduction": "per_sample_sum"},
    "logits": {"lakd__attention": "logits", "lakd__standardise": True},
    "inside": {"lakd__attention": "inside", "lakd__task": "aux_heads"},
    "global": {"lakd__att_global": True, "local__cut_scale": 0.5},
    "suffix": {"lakd__task": "teacher_suffix", "lakd__head_loss": "ce"},
}
FULL, SHORT = steps.rows(1)[0], steps.rows(2)[1][:5]


def filling(setting):
    """Returns the setting with batches that are filled up."""
    spec, *rest = setting
    return dataclasses.replace(spec, fills=True), *rest


def both(setting):
    """Returns (state, metrics) of a full and a short step: short, and filled up."""
    filled = order.filled(SHORT, len(FULL))
    one = steps.train(setting, [FULL, SHORT])
    return one, steps.train(filling(setting), [FULL, filled])


def assert_equal(one, other, rounding=2e-6):
    """Compares two trees; rounding errors are those of an array's largest numbers."""
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=rounding * scale)


def assert_equal_steps(setting):
    for (state, metrics), (ours, found) in zip(*both(setting), strict=True):
        assert_equal(ours, state)
        assert_equal(found, metrics)


@pytest.mark.parametrize("method", marks.others_long(METHODS, ["dkd"]))
def test_a_filled_step_is_the_short_step(method, tmp_path):
    fields = {"label_smoothing": 0.1} if method == "dkd" else {}
    setting = steps.small(tmp_path, 1, method=method, **fields)
    if method == "none":
        weights = dataclasses.replace(setting[0], class_weights=(0.5, 1.0, 2.0))
        setting = (weights, *setting[1:])
    assert_equal_steps(setting)


@LONG
@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_of_lakd_can_be_filled_up(name, tmp_path):
    assert_equal_steps(steps.small(tmp_path, 1, method="lakd", **VARIANTS[name]))


@LONG
def test_networks_that_draw_or_start_with_a_norm_can_be_filled_up(tmp_path):
    """What is drawn for an example does not depend on the rows after it."""
    wide = functools.partial(models.create, "wrn_10_1")
    fields = {"method": "lakd", "lakd__preact": True}
    assert_equal_steps(steps.small(tmp_path, 1, wide, **fields))
    assert_equal_steps(steps.small(tmp_path, 1, transformers.VIT, method="none"))


@LONG
@pytest.mark.parametrize(("kind", "devices"), [("dispatch", 1), ("fused", 4)])
def test_engines_run_a_filled_step_by_the_same_programs(kind, devices, tmp_path):
    setting = steps.small(tmp_path, devices, method="lakd")
    engine = engines.engine(kind, filling(setting), tmp_path)
    filled = order.filled(SHORT, len(FULL))
    metrics = [engine.read(engine.run(row[None])) for row in (FULL, filled)]
    assert len(engine._programs) == 1
    expected = steps.train(steps.small(tmp_path, 1, method="lakd"), [FULL, SHORT])
    steps.assert_close(engine.state(), expected[-1][0], rtol=2e-4, atol=2e-6)
    for one, (_, other) in zip(metrics, expected, strict=True):
        steps.assert_same_metrics({n: v[0] for n, v in one.items()}, other)


def test_draws_for_the_first_examples_do_not_depend_on_their_number():
    """Dropout and stochastic depth draw for the rows of a batch in order."""
    key = jax.random.key(3)
    many = jax.random.bernoulli(key, 0.3, (16, 4, 1))
    np.testing.assert_array_equal(jax.random.bernoulli(key, 0.3, (5, 4, 1)), many[:5])


# ------------------------------------------------------------------ batch norms


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"use_fast_variance": False}, (6, 2, 2, 3)),  # as networks have it
        ({}, (6, 3)),  # as methods have it
        ({"use_scale": False, "use_bias": False, "dtype": jnp.bfloat16}, (6, 4, 3)),
    ],
)
def test_a_norm_leaves_rows_out(options, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, shape), jnp.float32)
    valid = jnp.arange(6) < 4
    norm = nn.BatchNorm(use_running_average=False, momentum=0.9, **options)
    variables = norm.init(jax.random.key(0), x)

    def run(x, valid):
        with masking.norms_over(valid):
            return norm.apply(variables, x, mutable=["batch_stats"])

    (ours, stats), (expected, moved) = run(x, valid), run(x[:4], None)
    assert ours.dtype == expected.dtype
    ours, expected = (np.asarray(y, np.float32) for y in (ours, expected))
    small = 1e-2 if "dtype" in options else 1e-5
    np.testing.assert_allclose(ours[:4], expected, rtol=small, atol=1e-6)
    steps.assert_close(stats, moved, rtol=1e-6)
    noisy, same = run(x.at[4:].multiply(100), valid)
    np.testing.assert_array_equal(noisy[:4], ours[:4])
    steps.assert_close(same, stats, rtol=0)
    with pytest.raises(ValueError, match="norm of 6 rows in a batch of 5"):
        run(x, valid[:5])


def test_a_norm_over_other_axes_is_refused():
    norm = nn.BatchNorm(use_running_average=False, axis=1)
    variables = norm.init(jax.random.key(0), x := jnp.ones((4, 3, 2)))
    with pytest.raises(ValueError, match="`axis`"), masking.norms_over(x[:, 0, 0] > 0):
        norm.apply(variables, x, mutable=["batch_stats"])


# ------------------------------------------------------------------- where it is done


@pytest.mark.parametrize(
    ("fields", "examples", "expected"),
    [
        ({}, 70, True),
        ({"method": "lakd"}, 70, True),
        ({"student__name": "wrn_16_2"}, 70, True),
        ({}, 64, False),  # no short batch: the run stays as it is, to the bit
        ({}, 10, False),  # no full batch: there is one program anyway
        ({"data__drop_last": True}, 70, False),
        ({"method": "sp"}, 70, False),
        ({"method": "kd+sp"}, 70, False),
        ({"method": "dkd+kd"}, 70, True),
        ({"data__mixup": 0.8}, 70, False),
        ({"optim__accumulate": 2}, 70, False),
        ({"student__vam__enabled": True}, 70, False),
        ({"student__name": tiny.NETWORK}, 70, False),  # a registered network
    ],
)
def test_which_runs_fill_up_short_batches(fields, examples, expected, tmp_path):
    fields = {"method": "kd"} | fields
    with tiny.environment():
        config = resolved.resolve(tiny.config(tmp_path, **fields))
        assert setup.fills(config, examples) == expected


def test_only_a_class_itself_says_that_its_losses_are_per_example(monkeypatch):
    class Mine(distill.kd.KD):
        """May have other losses."""

    table = distill.registry.TABLE
    monkeypatch.setitem(table, "mine", dataclasses.replace(table["kd"], cls=Mine))
    assert not distill.facts("mine").per_example
    assert distill.facts("kd").per_example


@LONG
def test_a_run_that_fills_up_compiles_one_program_less(tmp_path, monkeypatch):
    """Three epochs of 70 images, five steps each, the last one of 6 images."""
    compiled, count = backend.compiled, []
    monkeypatch.setattr(
        backend, "compiled", lambda *given: [count.append(1), compiled(*given)][1]
    )
    programs = []
    for lab in resume.lab_of(tmp_path, train=70):
        fields = {"method": "none", "optim__lr": 0.01}
        for folder in ("short", "filled"):
            count.clear()
            lab.train(tmp_path / folder, **fields)
            programs.append(len(count))
            ours = models._BUILT_IN | {tiny.NETWORK}
            monkeypatch.setattr(models, "_BUILT_IN", ours)
    assert programs[0] == programs[1] + 1
    short, filled = (resume.finished(tmp_path / n) for n in ("short", "filled"))
    steps.assert_close(filled[0], short[0], rtol=1e-4, atol=2e-6)
    for line, expected in zip(filled[2], short[2], strict=True):
        assert line["step"] == expected["step"]
        np.testing.assert_allclose(
            line.get("loss", 0), expected.get("loss", 0), rtol=1e-4
        )


def test_a_filled_batch_is_like_the_others(tmp_path):
    plan = record_lib.Plan(
        batch_size=4,
        drop_last=False,
        examples=22,
        epochs=2,
        log_every=9,
        eval_every=1,
        save_every=9,
        steps_per_dispatch=9,
        keep=1,
        fills=True,
    )
    record = record_lib.RunRecord(plan, tmp_path, 0, None, None, None)
    assert record.alike(0, 6) == 6
    rows = record.rows(0, 6)
    assert rows.shape == (6, 4) and rows.dtype == np.int32
    assert rows[-1, 2:].tolist() == [-1, -1]
    assert sorted(rows.ravel()[:22].tolist()) == list(range(22))
