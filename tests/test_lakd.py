"""LAKD: the readings of its losses, and that modules learn apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from lakd_jax import models
from lakd_jax.distill import kd, lakd, method
from lakd_jax.models import chain

LITERAL = {
    "preset": "literal",
    "adapter": "shape",
    "normalise": "none",
    "head_loss": "ce",
}
# Every setting that changes which tensors a loss reads.
READINGS = {
    "default": {},
    "literal": LITERAL,
    "map": {"attention": "map"},
    "logits": {"attention": "logits"},
    "inside": {"attention": "inside"},
    "aux_heads": {"task": "aux_heads"},
    "teacher_suffix": {"task": "teacher_suffix", "head_loss": "ce"},
}
# The other values of the options, one each.
VALUES = [
    {"power": "1"},
    {"power": "softmax"},
    {"window": 2, "stride": 2},
    {"window": 0},
    {"window": 0, "stride": 4},
    {"f_sum": "signed"},
    {"f_sum": "square"},
    {"normalise": "l2"},
    {"normalise": "max"},
    {"normalise": "sigmoid"},
    {"normalise": "none"},
    {"reduction": "per_sample_sum"},
    {"adapter": "shape"},
    {"att_global": True},
    {"attention": "map", "att_global": True},
    {"attention": "logits", "att_global": True},
    {"module_start_epochs": (0, 1)},
]


def made(options, **fields):
    """A lesson, its variables and a batch."""
    lesson, batch = toys.lesson(options, **fields), toys.images()
    return lesson, *lesson.init(*batch), batch


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


def random_signals(options, size=4, student_channels=4, **changes):
    """Two modules of random activations; the suffix is a fixed linear map."""
    keys = jax.random.split(jax.random.key(0), 8)
    matrix = jax.random.normal(keys[6], (6, 5))

    def outputs(key):
        logits = jax.random.normal(key, (3, 5))
        return chain.Outputs(logits, (), (), (), jnp.zeros((3, 1)))

    shape = (3, size, size, student_channels)
    joints = tuple(jax.random.normal(k, shape) for k in keys[:2])
    fields = {
        "student": outputs(keys[2]),
        "teacher": outputs(keys[3]),
        "labels": jnp.array([0, 1, 4]),
        "epoch": jnp.float32(0),
        "student_joints": joints,
        "teacher_joints": tuple(jax.random.normal(k, (3, 4, 4, 6)) for k in keys[4:6]),
        "student_uncut": joints,
        "teacher_suffix": lambda k, h: jnp.tanh(h).mean((1, 2)) @ matrix,
    }
    signals = method.Signals(**(fields | changes))
    module = lakd.LAKD(lakd.Options(**options))
    key = jax.random.key(1)
    return signals, module, module.init(key, signals, train=True)


def applied(module, variables, signals):
    return module.apply(variables, signals, train=True, mutable=["batch_stats"])[0]


# Values


def test_feature_and_attention_loss_by_hand():
    u = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 2, 1, 2)
    v = jnp.array([0.0, 2.0, 1.0, 1.0]).reshape(1, 2, 1, 2)
    w = jnp.array([0.5, 1.5]).reshape(1, 2, 1, 1)
    assert lakd.feature_loss(u, v, "mean") == 14 / 4
    assert lakd.feature_loss(u, v, "per_sample_sum") == 14
    squares = (0.25 * 1, 2.25 * 13)
    assert lakd.attention_loss(u, v, w, "2", "mean") == sum(squares) / 4
    assert lakd.attention_loss(u, v, w, "1", "mean") == (0.5 * 1 + 1.5 * 13) / 4
    p = 1 / (1 + np.exp(-1.0))
    want = 2 * ((1 - p) * 1 + p * 13) / 4
    got = lakd.attention_loss(u, v, w, "softmax", "mean")
    assert got == pytest.approx(want, rel=1e-6)


def test_map_loss_by_hand():
    ours = jnp.array([3.0, 4.0]).reshape(1, 1, 2, 1)
    theirs = jnp.array([7.0, 0.0]).reshape(1, 1, 2, 1)
    got = lakd.map_loss(ours, theirs)
    assert got == pytest.approx(0.4**2 + 0.8**2, rel=1e-6)
    assert lakd.map_loss(ours, 9 * ours) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("power", ["2", "1", "softmax"])
def test_attention_loss_gradient_by_finite_differences(power):
    u, v, way = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 3))
    w = jnp.abs(v).sum(-1, keepdims=True)

    def loss(u):
        return lakd.attention_loss(u, v, w, power, "mean")

    step = 1e-2
    slope = float(loss(u + step * way) - loss(u - step * way)) / (2 * step)
    assert jnp.vdot(jax.grad(loss)(u), way) == pytest.approx(slope, rel=1e-3)


def test_weights_of_the_presets():
    assert lakd.Options().weights == (1, 1, 1)
    own = lakd.Options(head_weight=2, attention_weight=3, feature_weight=4)
    assert own.weights == (2, 3, 4)
    literal = lakd.Options(preset="literal", alpha=0.2, att_scale=10, beta=5)
    assert literal.weights == pytest.approx((0.2, 8, 5))


def test_terms_of_the_readings():
    def names(options):
        signals, module, variables = random_signals(options)
        return [set(loss.terms) for loss in applied(module, variables, signals)]

    both, head = {"feature", "attention"}, {"head_ce", "head_kd"}
    task = {"task_ce", "task_kd"}
    assert names({}) == [both, both | head]
    assert names({"head_loss": "ce"}) == [both, both | {"head_ce"}]
    assert names({"attention": "inside"}) == [{"feature"}, {"feature"} | head]
    assert names({"task": "aux_heads"}) == [both | task, both | head]
    assert names({"task": "teacher_suffix"}) == [both | task, both | head]


def test_values_of_the_module_losses():
    signals, module, _ = random_signals({"adapter": "shape"}, student_channels=6)
    losses = applied(module, {}, signals)
    h, z = signals.student_joints[0], signals.teacher_joints[0]
    terms = losses[0].terms
    assert terms["feature"] == lakd.feature_loss(h, z, "mean")
    mask = lakd.Options().mask(z)
    assert terms["attention"] == lakd.attention_loss(h, z, mask, "2", "mean")
    error = losses[0].diagnostics["feature_error"]
    want = float(terms["feature"] / jnp.mean(z**2))
    assert error == pytest.approx(want, rel=1e-6)
    logits, labels = signals.student.logits, signals.labels
    assert losses[1].terms["head_ce"] == kd.cross_entropy(logits, labels)
    divergence = kd.kd_loss(logits, signals.teacher.logits, 4.0)
    assert losses[1].terms["head_kd"] == divergence
    assert losses[1].weights["head_ce"] == 0.1 and losses[1].weights["head_kd"] == 0.9


def test_inside_puts_the_mask_into_the_feature_loss():
    wide = {"adapter": "shape", "attention": "inside"}
    signals, module, _ = random_signals(wide, student_channels=6)
    h, z = signals.student_joints[0], signals.teacher_joints[0]
    want = lakd.attention_loss(h, z, lakd.Options().mask(z), "2", "mean")
    assert applied(module, {}, signals)[0].terms["feature"] == want


def test_teacher_suffix_gets_features_of_the_teachers_size():
    seen = []

    def suffix(k, h):
        seen.append((k, h.shape))
        return jnp.zeros((3, 5))

    options = {"task": "teacher_suffix"}
    random_signals(options, size=2, teacher_suffix=suffix)
    assert set(seen) == {(0, (3, 4, 4, 6))}


def test_logits_reading_weighs_the_features_of_both():
    options = {"attention": "logits", "adapter": "shape"}
    signals, module, _ = random_signals(options, student_channels=6)
    h, z = signals.student_joints[0], signals.teacher_joints[0]
    w = lakd.Options().mask(z)
    suffix = signals.teacher_suffix
    want = kd.kd_loss(suffix(0, w * h), suffix(0, w * z), 4.0)
    assert applied(module, {}, signals)[0].terms["attention"] == want


@pytest.mark.parametrize(
    "options,size",
    # Sizes below, equal to and not dividing the teacher's 4; widths differ.
    [(o, 5) for o in [*READINGS.values(), *VALUES]]
    + [(READINGS[r], s) for r in ("default", "map", "teacher_suffix") for s in (2, 4)],
    ids=str,
)
def test_every_reading_is_finite_in_float32(options, size):
    signals, module, variables = random_signals(options, size=size)
    params = variables.get("params", {})
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, joints):
        joints = tuple(j.astype(jnp.bfloat16) for j in joints)
        uncut = joints if module.needs_uncut else ()
        seen = signals.replace(student_joints=joints, student_uncut=uncut)
        losses = applied(module, {"params": params, **rest}, seen)
        return method.total(losses), method.flatten_metrics(losses)

    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        params, signals.student_joints
    )
    assert all(m.dtype == jnp.float32 for m in metrics.values())
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, metrics, grads)))
    assert grads[1][0].any()


def test_all_zero_networks_give_finite_losses_and_gradients():
    for options in ({"attention": "map"}, {}, {"normalise": "l2"}):
        options = options | {"adapter": "shape"}
        signals, module, _ = random_signals(options, student_channels=6)
        zeros = jax.tree.map(jnp.zeros_like, signals.teacher_joints)

        def loss(joints, module=module, signals=signals, zeros=zeros):
            seen = signals.replace(student_joints=joints, teacher_joints=zeros)
            losses = applied(module, {}, seen)
            return method.total(losses), method.flatten_metrics(losses)

        grads, metrics = jax.grad(loss, has_aux=True)(zeros)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))


def test_modules_start_at_their_epochs():
    options = {"module_start_epochs": (2, 0)}
    signals, module, variables = random_signals(options)

    def totals(epoch):
        losses = applied(module, variables, signals.replace(epoch=jnp.float32(epoch)))
        return [float(loss.total()) for loss in losses]

    early, late = totals(1.9), totals(2.0)
    assert early[0] == 0 and late[0] > 0 and early[1] == late[1] > 0


def test_wrong_options_name_the_field():
    with pytest.raises(
        ValueError, match="attention is 'wieght'; did you mean 'weight'"
    ):
        lakd.Options(attention="wieght")
    with pytest.raises(ValueError, match="window"):
        lakd.Options(stride=0)
    with pytest.raises(ValueError, match="att_global"):
        lakd.Options(att_global=True, attention="inside")
    with pytest.raises(ValueError, match="module_start_epochs has 3"):
        random_signals({"module_start_epochs": (0, 1, 2)})
    with pytest.raises(ValueError, match="needs Signals.student_uncut"):
        random_signals({"att_global": True}, student_uncut=())
    with pytest.raises(ValueError, match="need Signals.teacher_suffix"):
        random_signals({"task": "teacher_suffix"}, teacher_suffix=None)


# Gradient isolation


@pytest.mark.parametrize("reading", READINGS)
def test_property_01_losses_reach_their_own_module_only(reading):
    lesson, *rest = made(READINGS[reading])
    np.testing.assert_array_equal(jacobian(lesson, *rest), np.eye(3, dtype=bool))


def test_property_01_holds_for_a_real_network():
    student = models.create("resnet8", num_classes=toys.CLASSES)
    teacher = models.create("resnet14", num_classes=toys.CLASSES)
    lesson = toys.lesson({}, student=student, teacher=teacher, size=16)
    batch = toys.images(8, 16)
    reached = jacobian(lesson, *lesson.init(*batch), batch)
    np.testing.assert_array_equal(reached, np.eye(3, dtype=bool))


def test_property_01_is_broken_on_purpose_by_global_attention():
    reached = jacobian(*made({"att_global": True}))
    np.testing.assert_array_equal(reached, np.tri(3, dtype=bool))


def test_module_input_teacher_isolates_too():
    lesson, *rest = made({}, teacher=toys.Toy(), module_input="teacher", cut_scale=1.0)
    np.testing.assert_array_equal(jacobian(lesson, *rest), np.eye(3, dtype=bool))


def test_property_02_a_target_touches_its_own_module_then_later_ones():
    changed = {1: lambda z: 2 * z[:, ::-1]}
    options = {"adapter": "always"}
    runs = []
    for steps in (1, 2):
        pair = []
        for targets in ({}, changed):
            lesson, params, stats, batch = made(options, targets=targets)
            params, *_ = lesson.train(toys.sgd(), params, stats, *batch, steps)
            pair.append(toys.by_module(params, lesson.labels(params), 3))
        equal = [
            all((a == b).all() for a, b in zip(*leaves, strict=True))
            for leaves in zip(*pair, strict=True)
        ]
        runs.append(equal)
    assert runs == [[True, False, True], [True, False, False]]


def test_property_03_one_optimiser_equals_one_a_module():
    lesson, params, stats, batch = made({})
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
        np.testing.assert_array_equal(a, b)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), together, params)
    assert sum(jax.tree.leaves(moved)) > 20


def test_property_04_full_scale_is_end_to_end_training():
    whole, params, stats, batch = made({}, cut_scale=None)
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
    lesson, params, stats, batch = made({})
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
        lesson, params, stats, batch = made({}, cut_scale=scale)

        def last(params, batch):
            losses, _ = lesson.losses(params, stats, *batch)
            return losses[2].total()

        grads = jax.jit(jax.grad(last))(params, batch)["student"]
        return grads["stage1"]["block1"]["conv"]["kernel"]

    # Two cuts lie between the last module and the first.
    np.testing.assert_allclose(
        gradient(0.5), 0.25 * gradient(1.0), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("reading", ["default", "map", "inside", "aux_heads"])
def test_property_06_the_teacher_gets_no_gradient(reading):
    lesson, params, stats, batch = made(READINGS[reading])
    before = jax.tree.map(np.array, lesson.teacher_variables)

    def total(teacher_variables, batch):
        losses, _ = lesson.losses(
            params, stats, *batch, teacher_variables=teacher_variables
        )
        return method.total(losses)

    grads = jax.jit(jax.grad(total))(lesson.teacher_variables, batch)
    assert not any(g.any() for g in jax.tree.leaves(grads))
    lesson.train(toys.sgd(), params, stats, *batch, 1)
    jax.tree.map(np.testing.assert_array_equal, before, lesson.teacher_variables)


@pytest.mark.parametrize("attention", ["weight", "map", "logits", "inside"])
def test_property_12_equal_features_give_no_loss_and_no_gradient(attention):
    options = {"adapter": "shape", "attention": attention}
    signals, module, _ = random_signals(options, student_channels=6)

    def loss(joints):
        seen = signals.replace(student_joints=joints)
        return [
            x.terms[n]
            for x in applied(module, {}, seen)
            for n in ("feature", "attention")
            if n in x.terms
        ]

    assert sum(map(abs, loss(signals.teacher_joints))) == pytest.approx(0, abs=1e-6)
    grads = jax.grad(lambda j: sum(loss(j)))(signals.teacher_joints)
    for grad in grads:
        np.testing.assert_allclose(grad, 0, atol=1e-6)


# Assembly


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_property_13_total_is_the_formula_of_its_terms(scale):
    alpha, att_scale, beta = 0.3, 20.0, 7.0
    options = LITERAL | {"alpha": alpha, "att_scale": att_scale, "beta": beta}
    lesson, params, stats, batch = made(options, cut_scale=scale)
    total, (losses, _) = jax.jit(lesson.total)(params, stats, *batch)
    metrics = method.flatten_metrics(losses)
    attention = sum(metrics[f"module{k}/attention"] for k in (1, 2, 3))
    feature = sum(metrics[f"module{k}/feature"] for k in (1, 2, 3))
    head = metrics["module3/head_ce"]
    want = alpha * head + (1 - alpha) * att_scale * attention + beta * feature
    assert float(total) == pytest.approx(float(want), rel=1e-6)


def test_property_14_without_features_early_modules_only_decay():
    options = LITERAL | {"alpha": 1.0, "beta": 0.0}
    lesson, params, stats, batch = made(options)
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
    options = LITERAL | {"alpha": 1.0, "beta": 0.0, "att_scale": 0.0}
    ours, params, stats, batch = made(options, cut_scale=1.0)
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
    lesson, params, stats, batch = made({"att_global": att_global})
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
    lesson, params, stats, batch = made({"task": "aux_heads"})
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
        lesson, params, stats, batch = made(options, teacher=teacher)
        own = params["method"]
        new, *_ = lesson.train(toys.sgd(decay=0.0), params, stats, *batch, 1)
        trained = jax.tree.map(lambda a, b: bool((a != b).any()), own, new["method"])
        assert all(
            t["adapter"]["conv"]["kernel"] for t in trained.values() if "adapter" in t
        )
        return sorted(name for name in own if "adapter" in own[name])

    every = ["module1", "module2", "module3"]
    same, wider = toys.Toy(), toys.Toy(width=6)
    assert adapters({"adapter": "always"}, same) == every
    assert adapters({"adapter": "shape"}, same) == []
    assert adapters({"adapter": "shape"}, wider) == every


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
