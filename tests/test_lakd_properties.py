"""LAKD in training: modules learn apart, and the total is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from lakd_jax import models
from lakd_jax.distill import method


def jacobian(lesson, params, stats, batch):
    """Per loss J_j and module k: whether any gradient of theta_k is not zero."""

    @jax.jit
    def gradient(params, weights, batch):
        def one(params):
            losses, _ = lesson.losses(params, stats, *batch)
            return jnp.vdot(weights, jnp.stack([loss.total() for loss in losses]))

        return jax.grad(one)(params)

    labels, count = lesson.labels(params), len(lesson.partition.names)
    rows = [
        toys.by_module(gradient(params, weights, batch), labels, count)
        for weights in jnp.eye(count)
    ]
    return np.array([[any(g.any() for g in leaves) for leaves in row] for row in rows])


# Gradient isolation


@pytest.mark.parametrize("reading", toys.READINGS)
def test_property_01_losses_reach_their_own_module_only(reading):
    lesson, *rest = toys.made(toys.READINGS[reading])
    np.testing.assert_array_equal(jacobian(lesson, *rest), np.eye(3, dtype=bool))


def test_property_01_holds_for_a_real_network():
    student = models.create("resnet8", num_classes=toys.CLASSES)
    teacher = models.create("resnet14", num_classes=toys.CLASSES)
    lesson = toys.lesson({}, student=student, teacher=teacher, size=16)
    batch = toys.images(8, 16)
    reached = jacobian(lesson, *lesson.init(*batch), batch)
    np.testing.assert_array_equal(reached, np.eye(3, dtype=bool))


def test_property_01_is_broken_on_purpose_by_global_attention():
    reached = jacobian(*toys.made({"att_global": True}))
    np.testing.assert_array_equal(reached, np.tri(3, dtype=bool))


def test_module_input_teacher_isolates_too():
    lesson, *rest = toys.made(
        {}, teacher=toys.Toy(), module_input="teacher", cut_scale=1.0
    )
    np.testing.assert_array_equal(jacobian(lesson, *rest), np.eye(3, dtype=bool))


def test_property_02_a_target_touches_its_own_module_then_later_ones():
    def trained(targets):
        lesson, params, stats, batch = toys.made({}, targets=targets)
        owned = []
        step = jax.jit(jax.grad(lesson.total, has_aux=True))
        for _ in range(2):
            grads, (_, stats) = step(params, stats, *batch)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
            owned.append(toys.by_module(params, lesson.labels(params), 3))
        return owned

    equal = [
        [
            all((a == b).all() for a, b in zip(*module, strict=True))
            for module in zip(*step, strict=True)
        ]
        for step in zip(
            trained({}), trained({1: lambda z: 2 * z[:, ::-1]}), strict=True
        )
    ]
    assert equal == [[True, False, True], [True, False, False]]


def test_property_03_one_optimiser_equals_one_a_module():
    lesson, params, stats, batch = toys.made({})
    labels = lesson.labels(params)

    def own(k, tree):
        return jax.tree.map(
            lambda x, o: x if o == k else jnp.zeros_like(x), tree, labels
        )

    @jax.jit
    def separate(params, stats, opt_states, batch):
        updates = jax.tree.map(jnp.zeros_like, params)
        new_states = []
        for k, opt_state in enumerate(opt_states):

            def loss(params, k=k):
                losses, new = lesson.losses(params, stats, *batch)
                return losses[k].total(), new

            grads, new = jax.grad(loss, has_aux=True)(params)
            mine, opt_state = optimizer.update(own(k, grads), opt_state, own(k, params))
            updates = jax.tree.map(jnp.add, updates, mine)
            new_states.append(opt_state)
        return optax.apply_updates(params, updates), new, new_states

    optimizer = toys.sgd()
    together, *_ = lesson.train(optimizer, params, stats, *batch, 3)
    apart, states = params, [optimizer.init(params) for _ in range(3)]
    for _ in range(3):
        apart, stats, states = separate(apart, stats, states, batch)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        # Bit for bit without fusion; two programs may fuse, so round, differently.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), together, params)
    assert sum(jax.tree.leaves(moved)) > 20


def test_property_04_full_scale_is_end_to_end_training():
    whole, params, stats, batch = toys.made({}, cut_scale=None)
    lesson = toys.lesson({}, cut_scale=1.0)
    got, want = (
        jax.jit(jax.grad(x.total, has_aux=True))(params, stats, *batch)[0]
        for x in (lesson, whole)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    reached = jacobian(lesson, params, stats, batch)
    np.testing.assert_array_equal(reached, np.tri(3, dtype=bool))


@pytest.mark.parametrize("module", [0, 1, 2])
def test_property_04_finite_differences_agree_inside_a_module(module):
    lesson, params, stats, batch = toys.made({})
    labels = lesson.labels(params)
    keys = iter(jax.random.split(jax.random.key(3), 100))
    way = jax.tree.map(
        lambda p, o: jax.random.normal(next(keys), p.shape) * float(o == module),
        params,
        labels,
    )

    @jax.jit
    def loss(params, batch):
        losses, _ = lesson.losses(params, stats, *batch)
        return losses[module].total()

    grads = jax.jit(jax.grad(loss))(params, batch)
    along = sum(map(jnp.vdot, jax.tree.leaves(grads), jax.tree.leaves(way)))

    def moved(step):
        shifted = jax.tree.map(lambda p, w: p + step * w, params, way)
        return float(loss(shifted, batch))

    step = 1e-3
    slope = (moved(step) - moved(-step)) / (2 * step)
    assert float(along) == pytest.approx(slope, rel=2e-2)


def test_cut_scale_multiplies_what_crosses():
    def gradient(scale):
        lesson, params, stats, batch = toys.made({}, cut_scale=scale)

        def last(params, batch):
            losses, _ = lesson.losses(params, stats, *batch)
            return losses[2].total()

        grads = jax.jit(jax.grad(last))(params, batch)["student"]
        return grads["stage1"]["block1"]["conv"]["kernel"]

    # Two cuts lie between the last module and the first.
    np.testing.assert_allclose(
        gradient(0.5), 0.25 * gradient(1.0), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("reading", ["default", "map", "inside"])
def test_property_06_the_teacher_gets_no_gradient(reading):
    lesson, params, stats, batch = toys.made(toys.READINGS[reading])

    def total(teacher_variables, batch):
        losses, _ = lesson.losses(
            params, stats, *batch, teacher_variables=teacher_variables
        )
        return method.total(losses)

    grads = jax.jit(jax.grad(total))(lesson.teacher_variables, batch)
    assert not any(g.any() for g in jax.tree.leaves(grads))


# Assembly


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_property_13_total_is_the_formula_of_its_terms(scale):
    alpha, att_scale, beta = 0.3, 20.0, 7.0
    options = toys.LITERAL | {"alpha": alpha, "att_scale": att_scale, "beta": beta}
    lesson, params, stats, batch = toys.made(options, cut_scale=scale)
    total, (losses, _) = jax.jit(lesson.total)(params, stats, *batch)
    metrics = method.flatten_metrics(losses)
    attention = sum(metrics[f"module{k}/attention"] for k in (1, 2, 3))
    feature = sum(metrics[f"module{k}/feature"] for k in (1, 2, 3))
    head = metrics["module3/head_ce"]
    want = alpha * head + (1 - alpha) * att_scale * attention + beta * feature
    assert float(total) == pytest.approx(float(want), rel=1e-6)


def test_property_14_without_features_early_modules_only_decay():
    options = toys.LITERAL | {"alpha": 1.0, "beta": 0.0}
    lesson, params, stats, batch = toys.made(options)
    new, *_ = lesson.train(toys.sgd(0.1, 0.9, 0.01), params, stats, *batch, 1)
    labels = lesson.labels(params)
    before, after = (toys.by_module(t, labels, 3) for t in (params, new))
    for k in (0, 1):
        for old, now in zip(before[k], after[k], strict=True):
            np.testing.assert_allclose(now, old * (1 - 0.1 * 0.01), rtol=1e-6)
    assert any(
        not np.allclose(now, old * (1 - 0.1 * 0.01))
        for old, now in zip(before[2], after[2], strict=True)
    )


def test_property_15_head_alone_and_uncut_is_plain_training():
    options = toys.LITERAL | {"alpha": 1.0, "beta": 0.0, "att_scale": 0.0}
    ours, params, stats, batch = toys.made(options, cut_scale=1.0)
    plain = toys.lesson({}, name="none", granularity="none")
    alone = {"student": params["student"], "method": {}}
    alone_stats = {"student": stats["student"], "method": {}}
    got, *_ = ours.train(toys.sgd(), params, stats, *batch, 3)
    want, *_ = plain.train(toys.sgd(), alone, alone_stats, *batch, 3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        got["student"],
        want["student"],
    )


@pytest.mark.parametrize("att_global", [False, True])
def test_property_17_statistics_move_once_a_step(att_global):
    lesson, params, stats, batch = toys.made({"att_global": att_global})
    _, new = jax.jit(lesson.losses)(params, stats, *batch)
    assert jax.tree.structure(new) == jax.tree.structure(stats)

    observe = jax.jit(lambda *args: lesson.signals(*args)[0].student_joints)
    joints = observe(params["student"], stats["student"], *batch)
    for k, h in enumerate(joints, 1):
        kernel = params["method"][f"module{k}"]["adapter"]["conv"]["kernel"][0, 0]
        mean = jnp.mean(h @ kernel, axis=(0, 1, 2))
        old = stats["method"][f"module{k}"]["adapter"]["bn"]["mean"]
        got = new["method"][f"module{k}"]["adapter"]["bn"]["mean"]
        np.testing.assert_allclose(got, 0.9 * old + 0.1 * mean, rtol=1e-4, atol=1e-6)
    once = lesson.student.apply(
        {"params": params["student"], "batch_stats": stats["student"]},
        batch[0],
        train=True,
        mutable=["batch_stats"],
    )[1]["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        new["student"],
        once,
    )


def test_property_18_the_student_is_the_plain_network():
    lesson, params, stats, batch = toys.made({"task": "aux_heads"})
    params, stats, *_ = lesson.train(toys.sgd(), params, stats, *batch, 1)
    plain = toys.Toy()
    fresh = plain.init(jax.random.key(0), batch[0], train=False)
    student = {"params": params["student"], "batch_stats": stats["student"]}
    assert jax.tree.structure(student) == jax.tree.structure(fresh)
    logits = plain.apply(student, batch[0], train=False).logits
    ours = lesson.student.apply(student, batch[0], train=False).logits
    np.testing.assert_array_equal(logits, ours)


def test_property_19_adapters_stand_where_they_should():
    def adapters(options, teacher):
        own = toys.made(options, teacher=teacher)[1]["method"]
        return sorted(name for name in own if "adapter" in own[name])

    every = ["module1", "module2", "module3"]
    same = toys.Toy()
    assert adapters({"adapter": "always"}, same) == every
    assert adapters({"adapter": "shape"}, same) == []
    # 4, 5, 6 channels against 6, 6, 6: the last module needs none.
    flat = toys.Toy(width=6, growth=0)
    assert adapters({"adapter": "shape"}, flat) == every[:2]

    lesson, params, stats, batch = toys.made({"adapter": "shape"}, teacher=flat)
    new, *_ = lesson.train(toys.sgd(decay=0.0), params, stats, *batch, 1)
    for name, own in params["method"].items():
        kernel = new["method"][name]["adapter"]["conv"]["kernel"]
        assert (kernel != own["adapter"]["conv"]["kernel"]).any()


@pytest.mark.long
def test_property_21_features_of_an_equal_network_can_be_overfitted():
    network = toys.Toy(width=8)
    lesson = toys.lesson({}, student=network, teacher=network)
    batch = toys.images(64, 8)
    params, stats = lesson.init(*batch)
    optimizer = optax.adam(3e-3)
    *_, first, last = lesson.train(optimizer, params, stats, *batch, 500)
    for k in (1, 2, 3):
        name = f"module{k}/feature"
        assert first[name] > 10 * last[name]
