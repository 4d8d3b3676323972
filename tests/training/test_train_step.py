"""Tests the compiled step: devices, dispatch, precision and metrics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from lakd_jax import errors, models
from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.interop import weights
from lakd_jax.runs import single
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import setup, step
from lakd_jax.training import spec as spec_lib


def resnet8(**options):
    return models.create("resnet8", **options)


def spec_of(tmp_path, devices=8, network=resnet8, **fields):
    """Returns (spec, a function for its first state, the teacher's variables)."""
    config = resolved.resolve(tiny.config(tmp_path, **fields))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    model = network(num_classes=3, dtype=jnp.dtype(config.dtype))
    student = weights.Loaded(model, None, "random weights")
    teacher = None
    if config.method != "none":
        variables = mesh_lib.replicate(tiny.variables(model), mesh)
        teacher = dataclasses.replace(student, variables=variables)
    spec, first = setup.spec(
        config,
        student,
        teacher,
        teacher_pixels=setup.pixels(config),
        image_shape=(8, 8, 3),
        steps_per_epoch=10,
        examples=160,
        mesh=mesh,
    )
    return spec, first, teacher.variables if teacher else None


def make(tmp_path, devices=8, network=resnet8, **fields):
    """Returns (spec, first state, teacher variables, data) for some devices."""
    spec, first, teacher = spec_of(tmp_path, devices, network, **fields)
    data = device.device_data(tiny.split(160, 0), fields.get("seed", 0), spec.mesh)
    return spec, first(), teacher, data


small = functools.partial(make, network=tiny.SMALL)


def one_step(setting, row):
    spec, state, teacher, data = setting
    jitted = jax.jit(lambda s, t, d, r: step.train_step(spec, s, t, d, r))
    return jitted(state, teacher, data, row)


def rows(steps, batch=16):
    return np.random.default_rng(3).integers(0, 160, (steps, batch)).astype(np.int32)


def run_singly(setting, indices):
    """Runs one step per dispatch, and returns the last state and all losses."""
    spec, state, teacher, data = setting
    program = jax.jit(lambda s, t, d, r: step.run_steps(spec, s, t, d, r))
    losses = []
    for row in indices:
        state, metrics = program(state, teacher, data, row[None])
        losses.append(float(metrics["loss"][0]))
    return state, losses


WEIGHTS = {"lakd__feature_weight": 3.0, "lakd__attention_weight": 2.0}


@pytest.fixture(scope="module")
def lakd(tmp_path_factory):
    """Returns (`small` for LAKD, [(state, metrics) after each of four steps])."""
    setting = small(tmp_path_factory.mktemp("lakd"), 1, method="lakd", **WEIGHTS)
    spec, state, teacher, data = setting
    program = jax.jit(functools.partial(step.run_steps, spec))
    after = []
    for row in rows(4):
        state, metrics = program(state, teacher, data, row[None])
        after.append((state, {name: value[0] for name, value in metrics.items()}))
    return setting, after


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    """Returns a cached function that runs twenty steps on some devices."""
    folder = tmp_path_factory.mktemp("devices")

    @functools.cache
    def run(method, devices):
        setting = small(folder, devices, method=method, optim__lr=0.01)
        return run_singly(setting, rows(20))

    return run


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("method", "devices"),
    [
        ("lakd", 8),
        *(pytest.param(m, n, marks=LONG) for m, n in (("lakd", 4), ("none", 8))),
    ],
)
def test_devices_train_as_one(method, devices, trained_on):
    """Promise 13: losses agree within 1e-5 until rounding crosses a ReLU's zero."""
    one, losses_one = trained_on(method, 1)
    many, losses = trained_on(method, devices)
    np.testing.assert_allclose(losses[:10], losses_one[:10], rtol=1e-5)
    # On some machines, rounding puts an activation on the other side of a ReLU's zero
    # in some step. From then on the two runs diverge slowly.
    np.testing.assert_allclose(losses, losses_one, rtol=1e-2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2),
        many.params,
        one.params,
    )


def test_several_steps_per_dispatch_equal_single_steps(lakd):
    (spec, first, teacher, data), after = lakd
    program = jax.jit(functools.partial(step.run_steps, spec))
    state, metrics = program(first, teacher, data, rows(4))
    assert int(state.step) == 4
    losses = [single["loss"] for _, single in after]
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        state.params,
        after[-1][0].params,
    )


def test_seed_decides_the_run(tmp_path):
    """Promise 13: the same seed gives the same losses, another seed different ones."""
    settings = [small(tmp_path, 1, method="none", seed=seed) for seed in (0, 0, 1)]
    program = jax.jit(functools.partial(step.run_steps, settings[0][0]))
    losses = []
    for _, state, teacher, data in settings:
        _, metrics = program(state, teacher, data, rows(3))
        losses.append(metrics["loss"].tolist())
    first, again, other = losses
    assert first == again
    assert not set(first) & set(other)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state(lakd, tmp_path):
    half = small(tmp_path, 1, method="lakd", dtype="bfloat16", **WEIGHTS)
    state, losses = run_singly(half, rows(2))
    assert np.isfinite(losses).all()
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    exact = lakd[1][0][1]["loss"]
    np.testing.assert_allclose(losses[0], exact, rtol=0.05)
    assert losses[0] != exact


def test_logged_total_is_the_sum_of_weighted_terms(lakd):
    """Property 13 of LAKD, on the metrics of the step."""
    metrics = lakd[1][0][1]
    head = 0.1 * metrics["module3/head_ce"] + 0.9 * metrics["module3/head_kd"]
    features = sum(metrics[f"module{k}/feature"] for k in (1, 2, 3))
    attention = sum(metrics[f"module{k}/attention"] for k in (1, 2, 3))
    expected = head + 3 * features + 2 * attention
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_metrics_report_gradient_and_decay_of_each_module(lakd):
    (spec, *_), after = lakd
    state, metrics = after[0]
    for k in (1, 2, 3):
        assert metrics[f"module{k}/grad_norm"] > 0
    leaves = [
        np.sum(np.square(x))
        for x, label in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(spec.labels), strict=True
        )
        if label == 1
    ]
    np.testing.assert_allclose(
        metrics["module2/decay_norm"], 5e-4 * np.sqrt(np.sum(leaves)), rtol=1e-5
    )


def test_without_features_lakd_uncut_is_plain_training(tmp_path):
    """Property 15 of LAKD: beta = s_att = 0, cut_scale = 1, alpha = 1."""
    indices = rows(5)
    plain, _ = run_singly(small(tmp_path, 1, method="none"), indices)
    lakd, _ = run_singly(
        small(
            tmp_path,
            1,
            lakd__preset="literal",
            lakd__alpha=1.0,
            lakd__beta=0.0,
            lakd__att_scale=0.0,
            local__cut_scale=1.0,
        ),
        indices,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        lakd.params["student"],
        plain.params["student"],
    )


def test_teacher_is_fed_with_its_own_normalisation(tmp_path):
    """Promise 18: the teacher's logits equal those of a direct call."""
    spec, state, teacher, data = small(tmp_path, 1, method="kd")
    pixels = spec_lib.Pixels((0.2, 0.3, 0.4), (0.5, 0.6, 0.7), jnp.float32)
    spec = dataclasses.replace(spec, teacher_pixels=pixels)

    @jax.jit
    def observe(state, teacher, data, row):
        images, labels = spec_lib.batch(spec, state.step, data, row)
        signals = step.first_signals(spec, state, teacher, images, labels, data.noise)
        return images, signals.teacher.logits

    images, logits = observe(state, teacher, data, rows(1)[0])
    x = (np.asarray(images) / 255 - pixels.mean) / np.array(pixels.std)
    apply = jax.jit(lambda v, x: spec.teacher.apply(v, x, train=False).logits)
    direct = apply(teacher, x.astype(np.float32))
    np.testing.assert_allclose(logits, direct, atol=1e-5)


def test_teacher_and_student_are_fed_at_their_own_sizes(tmp_path):
    """Promise 18: both networks are fed at the image size that they expect."""
    setting = small(tmp_path, 1, method="lakd", student__image_size=4)
    spec, state, teacher, data = setting
    assert spec.student_pixels.size == 4
    pixels = dataclasses.replace(spec.teacher_pixels, size=16)
    spec = dataclasses.replace(spec, teacher_pixels=pixels)

    def observe(state, teacher, data, row):
        images, labels = spec_lib.batch(spec, state.step, data, row)
        return step.first_signals(spec, state, teacher, images, labels, data.noise)

    signals = jax.eval_shape(observe, state, teacher, data, rows(1)[0])
    assert signals.student.features[0].shape[1:3] == (4, 4)
    assert signals.teacher.features[0].shape[1:3] == (16, 16)
    train_step = functools.partial(step.train_step, spec)
    jax.eval_shape(train_step, state, teacher, data, rows(1)[0])


def test_batch_statistics_are_updated_once_per_step(lakd):
    """Property 17 of LAKD, fused engine: momentum 0.9 is applied exactly once."""
    (spec, state, _, data), after = lakd

    @jax.jit
    def direct(state, data, row):
        images, _ = spec_lib.batch(spec, state.step, data, row)
        return spec.student.apply(
            state.variables("student"),
            spec.student_pixels(images),
            train=True,
            mutable=["batch_stats"],
        )[1]["batch_stats"]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        after[0][0].collections["batch_stats"]["student"],
        direct(state, data, rows(1)[0]),
    )


def test_student_variables_are_the_plain_network(lakd):
    """Property 18 of LAKD: they include no adapter or other part of the method."""
    spec, state, _, _ = lakd[0]
    images = jnp.zeros((1, 8, 8, 3))
    plain = jax.eval_shape(
        lambda: spec.student.init(jax.random.key(0), images, train=False)
    )
    student = state.variables("student")
    assert jax.tree.structure(student) == jax.tree.structure(dict(plain))
    assert state.params["method"]  # there are method parameters to exclude


@LONG
@pytest.mark.parametrize("method", ["afd", "rtk"])
def test_without_beta_tap_methods_are_kd_with_their_weights(method, tmp_path):
    """Properties 19 and 21 of RTK: the student's logits depend on the student only."""
    indices = rows(4)
    kd = {"kd__ce_weight": 1.0, "kd__kd_weight": 0.9}
    plain, _ = run_singly(small(tmp_path, 1, method="kd", **kd), indices)
    ours, _ = run_singly(
        small(tmp_path, 1, method=method, **{f"{method}__beta": 0.0}), indices
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        ours.params["student"],
        plain.params["student"],
    )
    shapes, expected = (
        jax.tree.map(jnp.shape, s.variables("student")) for s in (ours, plain)
    )
    assert shapes == expected and ours.params["method"]


@pytest.mark.long
@pytest.mark.parametrize("method", ["afd", "rtk"])
def test_tap_methods_train_in_bfloat16(method, tmp_path):
    half = small(tmp_path, 2, method=method, dtype="bfloat16")
    state, losses = run_singly(half, rows(2))
    assert np.isfinite(losses).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    setting = small(tmp_path, 1, method=method)
    exact, full = run_singly(setting, rows(2))
    np.testing.assert_allclose(losses[0], full[0], rtol=0.05)
    moved = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))),
        exact.params["method"],
        setting[1].params["method"],
    )
    assert max(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.parametrize(
    ("examples", "drop_last", "rejected"),
    [(33, False, True), (33, True, False), (34, False, False)],
)
def test_a_last_batch_of_one_is_rejected_if_batch_norm_needs_more(
    examples, drop_last, rejected, tmp_path
):
    c = tiny.config(tmp_path, method="rtk", data__drop_last=drop_last)
    if not rejected:
        single._check_last_batch(c, examples)
        return
    with pytest.raises(
        errors.ConfigError, match="leaves 1 of 33 .* set data.drop_last"
    ):
        single._check_last_batch(c, examples)
    c.method = "kd"
    single._check_last_batch(c, examples)
