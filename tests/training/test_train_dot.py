"""Tests the distillation-oriented trainer by hand, and the configs it rejects."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_train_optim as plain_sgd
import test_train_step as steps

from lakd_jax import config as config_lib
from lakd_jax.config import check, resolved
from lakd_jax.distill.base import method
from lakd_jax.training import dot

RNG = np.random.default_rng(0)
# Whether (task losses, other losses) reach each parameter.
REACHED = {"both": (True, True), "head": (True, False), "connector": (False, True)}


def random_gradients(reached):
    return [RNG.standard_normal(3) * r for r in reached]


STEPS = [
    {name: random_gradients(reached) for name, reached in REACHED.items()}
    for _ in range(3)
]
START = {name: RNG.standard_normal(3) for name in REACHED}


def split(grads):
    parts = [
        {n: jnp.asarray(g[i], jnp.float32) for n, g in grads.items()} for i in (0, 1)
    ]
    return dot.SplitGradients(*parts)


def dot_sgd(delta):
    return dot.sgd(
        optax.constant_schedule(0.1), momentum=0.5, delta=delta, weight_decay=0.01
    )


def trained(optimizer, gradients=None):
    """Returns the parameters after the steps with these gradients, split by default."""
    params = {name: jnp.asarray(x, jnp.float32) for name, x in START.items()}
    state = optimizer.init(params)
    for grads in gradients or map(split, STEPS):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_two_momenta_by_hand():
    """Momenta are 0.3 and 0.7 if both losses reach, else 0.5; decay is added once."""
    momenta = {"both": (0.3, 0.7), "head": (0.5, 0.0), "connector": (0.0, 0.5)}
    result = trained(dot_sgd(0.2))
    for name, (task_momentum, others_momentum) in momenta.items():
        p, task, others = START[name].copy(), 0.0, 0.0
        for grads in STEPS:
            g_task, g_others = grads[name]
            decay = 0.01 * p
            if name == "connector":
                g_others = g_others + decay
            else:
                g_task = g_task + decay
            task = task_momentum * task + g_task
            others = others_momentum * others + g_others
            p = p - 0.1 * (task + others)
        np.testing.assert_allclose(result[name], p, rtol=1e-5)


def test_with_delta_zero_it_is_sgd_with_momentum():
    optimizer = plain_sgd.sgd(dict.fromkeys(START, 0), momentum=0.5)
    summed = [jax.tree.map(jnp.add, *split(grads)) for grads in STEPS]
    steps.assert_close(trained(dot_sgd(0.0)), trained(optimizer, summed), rtol=1e-5)


def test_the_mask_leaves_out_vectors():
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    optimizer = dot.sgd(
        optax.constant_schedule(1.0),
        momentum=0.5,
        delta=0.1,
        weight_decay=0.1,
        decay_mask=True,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads = dot.SplitGradients(zeros, zeros)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_losses_separates_task_terms_from_others():
    first = method.ModuleLoss(
        {"task_ce": jnp.float32(1), "feature": jnp.float32(2)},
        {"task_ce": 3.0, "feature": 5.0},
        {"entropy": jnp.float32(100)},
    )
    last = method.ModuleLoss(
        {"head_ce": jnp.float32(7), "head_kd": jnp.float32(11)},
        {"head_ce": 0.5, "head_kd": 2.0},
        {},
    )
    assert [float(x) for x in dot.losses([first, last])] == [6.5, 32.0]


def test_steps_use_split_gradients(tmp_path):
    """The first step equals plain SGD, with momenta still zero; the second differs."""

    def two_steps(delta):
        setting = steps.small(tmp_path, 1, method="kd", optim__dot_delta=delta)
        return steps.train(setting, np.arange(32, dtype=np.int32).reshape(2, 16))

    (plain, metrics), (plain_later, _) = two_steps(0.0)
    (ours, our_metrics), (ours_later, _) = two_steps(0.09)
    steps.assert_same_metrics(our_metrics, metrics, rtol=1e-4)

    def distance(x, y):
        return float(optax.tree.norm(optax.tree.sub(x, y)))

    step_length = distance(plain_later.params, plain.params)
    assert distance(ours.params, plain.params) < 1e-4 * step_length
    assert distance(ours_later.params, plain_later.params) > 1e-2 * step_length
    buffers = ours.opt_state[0]
    for tree in buffers:
        assert np.any(tree["student"]["head"]["dense"]["bias"])
    (trace,) = (x.trace for x in plain.opt_state if hasattr(x, "trace"))
    summed = jax.tree.map(jnp.add, *buffers)
    assert distance(summed, trace) < 1e-4 * float(optax.tree.norm(trace))


def changed(fields):
    """Returns the default config with `fields`, and split momenta."""
    fields = {"optim.momentum": 0.8, "optim.dot_delta": 0.1, **fields}
    return config_lib.changed(config_lib.default(), fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "kd", "optim.momentum": 0.95}, "momenta 0.85 and 1.05"),
        ({"method": "kd", "optim.momentum": 0.05}, "momenta -0.05 and 0.15"),
        ({"method": "none"}, "method none has no loss but"),
        ({"method": "kd", "student.name": "hme"}, "hme has its own optimisers"),
        ({"method": "lakd"}, "method lakd trains modules separately unless"),
        ({"method": "kd", "optim.nesterov": True}, "does not support optim.nesterov"),
        ({"method": "kd", "optim.clip_norm": 1.0}, "does not support optim.clip_norm"),
    ],
)
def test_incompatible_fields_are_rejected(fields, message):
    (line,) = check.problems(changed(fields), 1)
    assert line.startswith("optim.dot_delta is 0.1") and message in line


def test_separately_run_modules_are_rejected():
    found = check.problems(changed({"local.engine": "dispatch"}), 1)
    assert any(
        "local.engine=dispatch trains modules separately" in line for line in found
    )


@pytest.mark.parametrize(
    "fields", [{"method": "dkd+at"}, {"method": "lakd", "local.cut_scale": 0.5}]
)
def test_methods_with_a_teacher_and_soft_cuts_are_allowed(fields):
    assert check.problems(changed(fields), 1) == []


def test_teachers_are_trained_without_it():
    configs = (changed({"optim.dot_delta": delta}) for delta in (0.0, 0.1))
    one, other = (resolved.of_teacher(resolved.resolve(c)) for c in configs)
    assert one.digest() == other.digest()
