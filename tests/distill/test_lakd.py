"""LAKD: its losses, term by term, in every reading."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax.distill import kd, lakd
from lakd_jax.distill.base import method

# Every choice and every reading, several at once. The student's sizes are below, equal
# to and not dividing the teacher's 4; widths differ.
TOGETHER = [
    ({"power": "1", "normalise": "l2", "window": 0}, 2),
    ({"power": "softmax", "f_sum": "signed", "window": 2, "stride": 2}, 5),
    ({"f_sum": "square", "normalise": "max", "reduction": "per_sample_sum"}, 5),
    ({"normalise": "sigmoid", "window": 0, "stride": 4, "att_global": True}, 4),
    (toys.LITERAL | {"attention": "inside", "task": "aux_heads"}, 5),
    ({"attention": "map", "att_global": True, "module_start_epochs": (0, 1)}, 2),
    ({"maps": "dtype"}, 4),
    ({"attention": "logits", "task": "teacher_suffix", "att_global": True}, 5),
]


def random_signals(options, size=4, student_channels=4, **changes):
    """Two modules of random activations; the suffix is a fixed linear map.

    The variables are drawn by NumPy: nothing is compiled.
    """
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    joints = tuple(normal(3, size, size, student_channels) for _ in range(2))
    matrix = normal(6, 5)
    fields = {
        "student_joints": joints,
        "teacher_joints": tuple(normal(3, 4, 4, 6) for _ in range(2)),
        "student_uncut": joints,
        "teacher_suffix": lambda k, h: jnp.tanh(h).mean((1, 2)) @ matrix,
    }
    student, teacher = (toys.outputs(normal(3, 5)) for _ in range(2))
    labels = jnp.array([0, 1, 4])
    signals = toys.signals(student, teacher, labels, **(fields | changes))
    module = lakd.LAKD(lakd.Options(**options))
    init = functools.partial(module.init, train=True)
    shapes = jax.eval_shape(init, jax.random.key(1), signals)
    return signals, module, toys.drawn(shapes, 1)


def applied(module, variables, signals):
    """The losses; not compiled, for most tests here run the same few operations."""
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


def test_property_11_no_gradient_reaches_the_teacher_or_its_mask():
    ours, theirs = (toys.noise(seed, 2, 4, 4, 3) for seed in (0, 1))

    @jax.jit
    def slopes(v, w):
        of_powers = [
            jax.grad(lakd.attention_loss, argnums=(1, 2))(ours, v, w, power, "mean")
            for power in lakd.CHOICES["power"]
        ]
        of_features = jax.grad(lakd.feature_loss, argnums=1)(ours, v, "mean")
        of_maps = jax.grad(lakd.map_loss, argnums=1)(ours[..., :1], w)
        of_mask = jax.grad(lambda v: jnp.sum(lakd.Options().mask(v)))(v)
        return of_powers, of_features, of_maps, of_mask

    found = slopes(theirs, np.abs(theirs[..., :1]))
    assert not any(np.any(slope) for slope in jax.tree.leaves(found))


def test_weights_of_the_presets():
    assert lakd.Options().weights == (1, 1, 1)
    own = lakd.Options(head_weight=2, attention_weight=3, feature_weight=4)
    assert own.weights == (2, 3, 4)
    literal = lakd.Options(preset="literal", alpha=0.2, att_scale=10, beta=5)
    assert literal.weights == pytest.approx((0.2, 8, 5))


def test_terms_of_the_readings():
    def names(options):
        signals, module, variables = random_signals(options)
        losses = jax.eval_shape(functools.partial(applied, module), variables, signals)
        return [set(loss.terms) for loss in losses]

    both, head = {"feature", "attention"}, {"head_ce", "head_kd"}
    task = {"task_ce", "task_kd"}
    assert names({}) == [both, both | head]
    assert names({"head_loss": "ce"}) == [both, both | {"head_ce"}]
    assert names({"attention": "inside"}) == [{"feature"}, {"feature"} | head]
    assert names({"task": "aux_heads"}) == [both | task, both | head]
    assert names({"task": "teacher_suffix"}) == [both | task, both | head]


def same_widths(**options):
    """Signals and losses without adapters; features and mask of the first module."""
    options = {"adapter": "shape"} | options
    signals, module, _ = random_signals(options, student_channels=6)
    h, z = signals.student_joints[0], signals.teacher_joints[0]
    return signals, applied(module, {}, signals), (h, z, lakd.Options().mask(z))


def test_values_of_the_module_losses():
    signals, losses, (h, z, mask) = same_widths()
    terms = losses[0].terms
    assert terms["feature"] == lakd.feature_loss(h, z, "mean")
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
    _, losses, (h, z, mask) = same_widths(attention="inside")
    want = lakd.attention_loss(h, z, mask, "2", "mean")
    assert losses[0].terms["feature"] == want


def test_logits_reading_weighs_the_features_of_both():
    signals, losses, (h, z, mask) = same_widths(attention="logits")
    suffix = signals.teacher_suffix
    want = kd.kd_loss(suffix(0, mask * h), suffix(0, mask * z), 4.0)
    assert losses[0].terms["attention"] == want


def test_teacher_suffix_gets_features_of_the_teachers_size():
    seen = []

    def suffix(k, h):
        seen.append((k, h.shape))
        return jnp.zeros((3, 5))

    options = {"task": "teacher_suffix"}
    random_signals(options, size=2, teacher_suffix=suffix)
    assert set(seen) == {(0, (3, 4, 4, 6))}


def gradients(signals, module, variables):
    """(total, losses) and their gradients to parameters and joints in bfloat16."""

    def loss(params, joints, rest, signals):
        joints = tuple(j.astype(jnp.bfloat16) for j in joints)
        uncut = joints if module.needs_uncut else ()
        seen = signals.replace(student_joints=joints, student_uncut=uncut)
        losses = applied(module, {"params": params, **rest}, seen)
        return method.total(losses), method.flatten_metrics(losses)

    params = variables.get("params", {})
    rest = {k: v for k, v in variables.items() if k != "params"}
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return both(params, signals.student_joints, rest, signals)


@pytest.mark.parametrize("options,size", TOGETHER, ids=str)
def test_every_reading_is_finite_in_float32(options, size):
    (value, metrics), grads = gradients(*random_signals(options, size))
    assert all(m.dtype == jnp.float32 for m in metrics.values())
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, metrics, grads)))
    assert grads[1][0].any()


def test_maps_of_the_networks_type_are_close_and_summed_in_float32():
    found = {}
    for maps in lakd.CHOICES["maps"]:
        signals, module, variables = random_signals({"maps": maps})
        seen = signals.replace(
            student_joints=tuple(x.astype("bfloat16") for x in signals.student_joints),
            teacher_joints=tuple(x.astype("bfloat16") for x in signals.teacher_joints),
        )
        run = functools.partial(applied, module)
        program = str(jax.make_jaxpr(run)(variables, seen))
        # The adapter's convolution and what its norm puts out.
        assert ("bf16[3,4,4,6] = conv" in program) == (maps == "dtype")
        found[maps] = method.flatten_metrics(run(variables, seen))
        exact = method.flatten_metrics(run(variables, signals))
        assert all(x.dtype == jnp.float32 for x in found[maps].values())
        if maps == "dtype":  # float32 networks: nothing changes
            wanted = method.flatten_metrics(applied(*random_signals({})[1:], signals))
            jax.tree.map(np.testing.assert_array_equal, exact, wanted)
    for name, value in found["float32"].items():
        np.testing.assert_allclose(found["dtype"][name], value, rtol=0.02)
        assert "head" in name or found["dtype"][name] != value


def test_no_choice_and_no_reading_is_left_out_of_those_that_are_run():
    run = [item for options, _ in TOGETHER for item in options.items()]
    run += vars(lakd.Options()).items()
    choices = [(name, value) for name in lakd.CHOICES for value in lakd.CHOICES[name]]
    for item in [*choices, *(i for r in toys.READINGS.values() for i in r.items())]:
        assert item in run, item


def test_all_zero_networks_give_finite_losses_and_gradients():
    kinds = [{"normalise": kind} for kind in lakd.CHOICES["normalise"]]
    for options in ({"attention": "map"}, *kinds):
        options = options | {"adapter": "shape"}
        signals, module, _ = random_signals(options, student_channels=6)
        zeros = jax.tree.map(jnp.zeros_like, signals.teacher_joints)

        def loss(joints, signals, module=module):
            losses = applied(module, {}, signals.replace(student_joints=joints))
            return method.total(losses), method.flatten_metrics(losses)

        seen = signals.replace(teacher_joints=zeros)
        grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(zeros, seen)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))


def test_modules_start_at_their_epochs():
    options = {"module_start_epochs": (2, 0)}
    signals, module, variables = random_signals(options)

    def totals(epoch):
        losses = applied(module, variables, signals.replace(epoch=jnp.float32(epoch)))
        return [float(loss.total()) for loss in losses]

    early, late = totals(1.9), totals(2.0)
    assert early[0] == 0 and late[0] > 0 and early[1] == late[1] > 0


def test_weights_of_features_fall_to_their_floor():
    options = {"feature_floor": 0.2, "feature_weight": 10, "epochs": 8}
    signals, module, variables = random_signals(options)

    def weights(epoch):
        seen = signals.replace(epoch=jnp.float32(epoch))
        return applied(module, variables, seen)[1].weights

    for epoch, share in ((0, 1.0), (4, 0.6), (8, 0.2), (9, 0.2)):
        found = weights(epoch)
        assert float(found["feature"]) == pytest.approx(10 * share, rel=1e-6)
        assert float(found["attention"]) == pytest.approx(share, rel=1e-6)
        assert found["head_ce"] == 0.1 and found["head_kd"] == 0.9


def test_wrong_options_name_the_field():
    with pytest.raises(
        ValueError, match="attention is 'wieght'; did you mean 'weight'"
    ):
        lakd.Options(attention="wieght")
    with pytest.raises(ValueError, match="stride must be at least 1, is 0"):
        lakd.Options(stride=0)
    with pytest.raises(ValueError, match="att_global"):
        lakd.Options(att_global=True, attention="inside")
    with pytest.raises(ValueError, match="module_start_epochs has 3"):
        random_signals({"module_start_epochs": (0, 1, 2)})
    with pytest.raises(ValueError, match="needs Signals.student_uncut"):
        random_signals({"att_global": True}, student_uncut=())
    with pytest.raises(ValueError, match="need Signals.teacher_suffix"):
        random_signals(
            {"task": "teacher_suffix"}, teacher_suffix=method.Signals.teacher_suffix
        )


@pytest.mark.parametrize("attention", ["weight", "map", "logits", "inside"])
def test_property_12_equal_features_give_no_loss_and_no_gradient(attention):
    options = {"adapter": "shape", "attention": attention}
    signals, module, _ = random_signals(options, student_channels=6)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def loss(joints, signals):
        losses = applied(module, {}, signals.replace(student_joints=joints))
        terms = [loss.terms for loss in losses]
        own = [t[n] for t in terms for n in ("feature", "attention") if n in t]
        return sum(own), own

    grads, own = loss(signals.teacher_joints, signals)
    assert len(own) == (2 if attention == "inside" else 4)
    assert sum(map(abs, own)) == pytest.approx(0, abs=1e-6)
    for grad in grads:
        np.testing.assert_allclose(grad, 0, atol=1e-6)
