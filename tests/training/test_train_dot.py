"""Tests momenta for groups of losses by hand, and the configs that are rejected."""

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
from lakd_jax.training import dot, phase

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


TWO = dot.of_delta(0.0)


def split(grads, groups=TWO):
    parts = [
        {n: jnp.asarray(g[i], jnp.float32) for n, g in grads.items()}
        for i in range(len(groups))
    ]
    return dot.split(groups, parts)


def sgd(groups):
    schedule = optax.constant_schedule(0.1)
    return dot.sgd(schedule, groups, momentum=0.5, weight_decay=0.01)


def dot_sgd(delta):
    return sgd(dot.of_delta(delta))


def trained(optimizer, gradients=None, start=START):
    """Returns the parameters after the steps with these gradients, split by default."""
    params = {name: jnp.asarray(x, jnp.float32) for name, x in start.items()}
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


def test_three_momenta_by_hand():
    """The decay is the target's, or else that of the first group that reaches.

    A parameter that one group reaches has the mean of all momenta.
    """
    groups = (
        dot.Group("task", 0.3, ("head_ce",)),
        dot.Group("target", -0.2, ("tckd",), decays=True),
        dot.Group("others", 0.05),
    )
    cases = {  # (reached by, momenta, the group that the decay is added to)
        "all": ((1, 1, 1), (0.8, 0.3, 0.55), 1),
        "not_target": ((1, 0, 1), (0.8, 0.3, 0.55), 0),
        "task": ((1, 0, 0), (0.55,) * 3, 0),
        "target": ((0, 1, 0), (0.55,) * 3, 1),
        "others": ((0, 0, 1), (0.55,) * 3, 2),
        "none": ((0, 0, 0), (0.55,) * 3, 1),
    }
    steps = [
        {name: random_gradients(case[0]) for name, case in cases.items()}
        for _ in range(3)
    ]
    start = {name: RNG.standard_normal(3) for name in cases}
    result = trained(sgd(groups), [split(grads, groups) for grads in steps], start)
    for name, (_, momenta, home) in cases.items():
        p, buffers = start[name].copy(), np.zeros((3, 3))
        for grads in steps:
            grad = np.array(grads[name])
            grad[home] += 0.01 * p
            buffers = np.array(momenta)[:, None] * buffers + grad
            p = p - 0.1 * buffers.sum(0)
        np.testing.assert_allclose(result[name], p, rtol=1e-5)


def test_with_delta_zero_it_is_sgd_with_momentum():
    optimizer = plain_sgd.sgd(dict.fromkeys(START, 0), momentum=0.5)
    summed = [jax.tree.map(jnp.add, *split(grads)) for grads in STEPS]
    steps.assert_close(trained(dot_sgd(0.0)), trained(optimizer, summed), rtol=1e-5)


def test_the_mask_leaves_out_vectors():
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    groups = dot.of_delta(0.1)
    optimizer = dot.sgd(
        optax.constant_schedule(1.0),
        groups,
        momentum=0.5,
        weight_decay=0.1,
        decay_mask=True,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads = dot.split(groups, [zeros, zeros])
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
    found = dot.losses(dot.of_delta(0.1), [first, last])
    assert [float(x) for x in found] == [6.5, 32.0]


def momenta(fields):
    config = config_lib.changed(config_lib.default(), fields)
    return phase.first(resolved.resolve(config)).momenta()


@pytest.mark.parametrize(
    "fields",
    [{"method": "deepkd"}, {"method": "deepkd+at"}, {"method": "lakd+deepkd"}],
)
def test_methods_may_have_momenta_of_their_own(fields):
    """Terms of other methods in a sum belong to the group that has all others."""
    groups = momenta(fields | {"deepkd.task_delta": 0.01})
    assert [(g.name, g.shift, g.decays) for g in groups] == [
        ("task", 0.01, False),
        ("target", -0.075, True),
        ("others", 0.075, False),
    ]
    terms = dict.fromkeys(("head_ce", "tckd", "nckd", "at"), jnp.float32(1))
    weights = {"head_ce": 1.0, "tckd": 2.0, "nckd": 3.0, "at": 4.0}
    found = dot.losses(groups, [method.ModuleLoss(terms, weights, {})])
    assert [float(x) for x in found] == [1.0, 2.0, 7.0]


def test_there_is_one_momentum_where_nothing_shifts_it():
    names = ("task_delta", "target_delta", "others_delta")
    zeros = {f"deepkd.{name}": 0.0 for name in names}
    assert momenta({"method": "deepkd", **zeros}) == momenta({"method": "kd"}) == ()


PLAIN = {
    "kd": {"optim__dot_delta": 0.0},
    "deepkd": {f"deepkd__{name}_delta": 0.0 for name in ("task", "target", "others")},
}
SPLIT = {"kd": {"optim__dot_delta": 0.09}, "deepkd": {"deepkd__task_delta": 0.09}}


@pytest.mark.parametrize("name", [pytest.param("kd", marks=pytest.mark.long), "deepkd"])
def test_steps_use_split_gradients(name, tmp_path):
    """The first step equals plain SGD, with momenta still zero; the second differs."""

    def two_steps(fields):
        setting = steps.small(tmp_path, 1, method=name, **fields)
        return steps.train(setting, np.arange(32, dtype=np.int32).reshape(2, 16))

    (plain, metrics), (plain_later, _) = two_steps(PLAIN[name])
    (ours, our_metrics), (ours_later, _) = two_steps(SPLIT[name])
    steps.assert_same_metrics(our_metrics, metrics, rtol=1e-4)

    def distance(x, y):
        return float(optax.tree.norm(optax.tree.sub(x, y)))

    step_length = distance(plain_later.params, plain.params)
    assert distance(ours.params, plain.params) < 1e-4 * step_length
    assert distance(ours_later.params, plain_later.params) > 1e-2 * step_length
    buffers = ours.opt_state[0]
    assert buffers._fields[0] == "task" and buffers._fields[-1] == "others"
    for tree in buffers:
        assert np.any(tree["student"]["head"]["dense"]["bias"])
    (trace,) = (x.trace for x in plain.opt_state if hasattr(x, "trace"))
    summed = dot.summed(buffers)
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
        ({"method": "deepkd"}, "deepkd.others_delta set the momenta"),
    ],
)
def test_incompatible_fields_are_rejected(fields, message):
    (line,) = check.problems(changed(fields), 1)
    assert line.startswith("optim.dot_delta is 0.1") and message in line


@pytest.mark.parametrize(
    ("fields", "start", "message"),
    [
        ({"optim.momentum": 0.95}, "deepkd.task_delta is 0.075", "momentum 1.025"),
        ({"optim.momentum": 0.05}, "deepkd.target_delta is -0.075", "-0.025 must"),
        ({"optim.name": "adamw"}, "deepkd.task_delta, deepkd.t", "adamw has none"),
        ({"optim.nesterov": True}, "deepkd.task_delta, d", "optim.nesterov: set them"),
        ({"optim.clip_norm": 1.0}, "deepkd.task_delta, d", "optim.clip_norm"),
        ({"student.name": "hme"}, "deepkd.task_delta, d", "hme has its own"),
        ({"method": "kd", "baselines": ("deepkd",)}, "", ""),
        (
            {"method": "kd", "baselines": ("deepkd",), "optim.clip_norm": 1.0},
            *("deepkd.task_delta, d", "optim.clip_norm"),
        ),
    ],
)
def test_a_methods_momenta_need_sgd(fields, start, message):
    config = config_lib.changed(config_lib.default(), {"method": "deepkd"} | fields)
    found = [line for line in check.problems(config, 1) if "_delta" in line]
    assert len(found) == bool(start)
    assert all(line.startswith(start) and message in line for line in found)


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
