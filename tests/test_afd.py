"""AFD against the published code, and the properties of the project's notes (1-11)."""

import functools
import json

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tap_toys

from lakd_jax import distill, models
from lakd_jax.distill import afd, kd, method, ndam
from lakd_jax.distill import tap_attention as attention_lib

KEY = jax.random.key(0)
OPTIONS = {
    "qk_dim": 8,
    "ce_weight": 1.0,
    "kd_weight": 0.9,
    "beta": 200.0,
    "temperature": 4.0,
}


@functools.partial(jax.jit, static_argnums=3)
def attend(variables, teacher, student, dim=8):
    """AFD's attention (B, T, S) and distances (B, S, T), in training mode."""
    logits, _ = attention_lib.Similarity(dim).apply(
        variables,
        attention_lib.descriptors(teacher),
        attention_lib.descriptors(student),
        train=True,
        mutable=["batch_stats"],
    )
    distances = attention_lib.distances(student, teacher, "mean")
    return jax.nn.softmax(logits), distances


def similarity(teacher, student, dim=8, seed=0):
    """Variables of the attention network for these taps."""
    ours, theirs = map(attention_lib.descriptors, (student, teacher))
    return tap_toys.variables(attention_lib.Similarity(dim), theirs, ours, seed=seed)


def loss(variables, teacher, student, dim=8):
    return afd.afd_loss(*attend(variables, teacher, student, dim))


def proportional(taps, factor=3.0):
    """Same maps up to scale, channels in another order."""
    return tuple(factor * t[..., ::-1] for t in taps)


# Against the published code


def golden_variables():
    """The published module's made-up weights in our tree."""
    folder = golden_weights.FOLDER / "afd"
    spec = json.loads((folder / "case.json").read_text())
    torch = {
        name.removeprefix("attention."): golden_weights.tensor(
            spec["prefix"] + name, tuple(shape)
        )
        for name, shape in spec["state_dict"]
    }
    params = {"query_positions": torch["p_t"], "key_positions": torch["p_s"]}
    stats = {}

    def put(ours, sources):
        for index, source in enumerate(sources, 1):
            name = ours if ours == "expand" else f"{ours}{index}"
            params[name] = {
                "kernel": torch[f"{source}.linear.weight"].T,
                "bias": torch[f"{source}.linear.bias"],
            }

        def joined(part):
            return np.concatenate([torch[f"{source}.bn.{part}"] for source in sources])

        params[f"{ours}_bn"] = {"scale": joined("weight"), "bias": joined("bias")}
        stats[f"{ours}_bn"] = {
            "mean": joined("running_mean"),
            "var": joined("running_var"),
        }

    put("query", [f"linear_trans_t.query_layer.{i}" for i in range(4)])
    put("key", [f"linear_trans_s.key_layer.{i}" for i in range(3)])
    put("expand", ["linear_trans_s.bilinear"])
    return {"params": params, "batch_stats": stats}


def test_golden_attention_loss_and_gradients():
    with np.load(golden_weights.FOLDER / "afd" / "case.npz") as file:
        golden = dict(file)

    def named(part, count):
        names = [f"feat_{part}_{i}" for i in range(count)]
        return tuple(jnp.asarray(golden[n].transpose(0, 2, 3, 1)) for n in names)

    teacher, student = named("teacher", 4), named("student", 3)
    variables = golden_variables()
    attention, _ = attend(variables, teacher, student, 128)
    assert golden_weights.distance(attention, golden["attention"]) < 1e-5
    whole = jax.jit(jax.value_and_grad(loss, 2), static_argnums=3)
    value, gradients = whole(variables, teacher, student, 128)
    assert golden_weights.distance(value, golden["loss"]) < 1e-5
    for index, gradient in enumerate(gradients):
        wanted = golden[f"grad_feat_student_{index}"].transpose(0, 2, 3, 1)
        assert golden_weights.distance(gradient, wanted) < 1e-4


# Properties, by their number


def test_1_attention_sums_to_one_over_student_taps():
    teacher, student = (
        tap_toys.taps(s, 3) for s in (tap_toys.TEACHER, tap_toys.STUDENT)
    )
    attention, distances = attend(similarity(teacher, student), teacher, student)
    assert attention.shape == (5, 4, 3) and distances.shape == (5, 3, 4)
    assert jnp.min(attention) >= 0
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert jnp.max(jnp.abs(attention.sum(1) - 4 / 3)) > 0.01


def test_2_one_tap_each_is_the_plain_distance():
    (teacher, student) = tap_toys.taps(((4, 6), (8, 6)), 1)
    variables = similarity((teacher,), (student,))
    attention, distances = attend(variables, (teacher,), (student,))
    np.testing.assert_array_equal(attention, 1)
    value = loss(variables, (teacher,), (student,))
    assert value == pytest.approx(float(distances.mean()), rel=1e-6)
    alike = similarity((teacher,), (teacher,))
    assert loss(alike, (teacher,), (teacher,)) == pytest.approx(0, abs=1e-7)
    scaled = proportional((teacher,), 2.5)
    assert loss(alike, (teacher,), scaled) == pytest.approx(0, abs=1e-7)
    mixed = attention_lib.distances(student[None, ..., ::-1], teacher[None], "mean")
    np.testing.assert_allclose(mixed, distances, rtol=1e-6)


def test_3_identical_features_still_cost():
    taps = tap_toys.taps(((8, 4), (8, 4), (4, 8)), 2)
    _, distances = attend(similarity(taps, taps), taps, taps)
    diagonal = jnp.diagonal(distances, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal, 0, atol=1e-6)
    assert loss(similarity(taps, taps), taps, taps) > 1e-3
    base = taps[0]
    same = (base, 2 * base, 3 * base)
    assert loss(similarity(same, same), same, same) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_4_loss_and_distances_are_bounded(seed):
    teacher = tap_toys.taps(tap_toys.TEACHER, seed)
    student = tap_toys.taps(tap_toys.STUDENT, seed + 10)
    _, distances = attend(similarity(teacher, student), teacher, student)
    limits = np.array([2 / side**2 for side, _ in tap_toys.TEACHER])
    assert jnp.min(distances) >= 0
    assert (np.asarray(distances) <= limits[None, None] + 1e-6).all()
    assert 0 <= loss(similarity(teacher, student), teacher, student) <= limits.sum()


def test_5_distances_are_those_of_the_maps_written_out():
    """H W D = 2 - 2 cos, and both are the mean of squares by hand."""
    teacher, student = tap_toys.taps(((4, 3), (8, 5)), 4)
    pooled = np.asarray(student**2).mean(-1).reshape(5, 4, 2, 4, 2).mean((2, 4))
    f, g = (np.asarray(x).reshape(5, -1) for x in (pooled, (teacher**2).mean(-1)))
    f, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (f, g))
    got = attention_lib.distances((student,), (teacher,), "mean")[:, 0, 0]
    np.testing.assert_allclose(got, ((f - g) ** 2).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(16 * got, 2 - 2 * (f * g).sum(-1), rtol=1e-4)


def test_6_gradients_go_to_the_student_through_values_and_keys_alone():
    teacher = tap_toys.taps(tap_toys.TEACHER, 5)
    student = tap_toys.taps(tap_toys.STUDENT, 6)
    variables = similarity(teacher, student)

    def parts(values, keys, theirs):
        attention, _ = attend(variables, theirs, keys)
        _, distances = attend(variables, theirs, values)
        return afd.afd_loss(attention, distances)

    through = jax.jit(jax.grad(parts, argnums=(0, 1)))(student, student, teacher)
    for way in through:
        assert all(tap_toys.largest(tap) > 1e-8 for tap in way)

    def whole(teacher):
        made = tap_toys.signals(student, teacher)
        module = distill.create("afd", OPTIONS)
        variables = module.init(KEY, made, train=True)
        losses, _ = module.apply(variables, made, train=True, mutable=["batch_stats"])
        return method.total(losses)

    assert tap_toys.largest(jax.jit(jax.grad(whole))(teacher)) == 0


def test_7_order_of_student_taps_does_not_matter():
    teacher = tap_toys.taps(tap_toys.TEACHER, 7)
    student = tap_toys.taps(((8, 4), (4, 8)), 8)
    variables = similarity(teacher, student)
    params = dict(variables["params"])
    params["key1"], params["key2"] = params["key2"], params["key1"]
    params["key_positions"] = params["key_positions"][::-1]
    halves = jax.tree.map(lambda x: x.reshape(2, -1)[::-1].ravel(), params["key_bn"])
    swapped = {**variables, "params": {**params, "key_bn": halves}}
    attention, _ = attend(variables, teacher, student)
    other, _ = attend(swapped, teacher, student[::-1])
    np.testing.assert_allclose(other, attention[..., ::-1], rtol=1e-4)
    a, b = loss(variables, teacher, student), loss(swapped, teacher, student[::-1])
    assert a == pytest.approx(float(b), rel=1e-5)
    # A constant added to a row of logits: the same offset in every key's product.
    logits = jax.random.normal(KEY, (2, 3, 4))
    row = jnp.broadcast_to(jnp.arange(3.0)[None, :, None], logits.shape)
    np.testing.assert_allclose(
        jax.nn.softmax(logits + row), jax.nn.softmax(logits), rtol=1e-5
    )


def test_8_pooling():
    x = jax.random.normal(KEY, (2, 32, 32, 3))
    means = x.reshape(2, 8, 4, 8, 4, 3).mean((2, 4))
    pool = functools.partial(ndam.adaptive_pool, reduce=jnp.mean)
    np.testing.assert_allclose(pool(x, 8, 8), means, atol=1e-6)
    small = x[:, :8, :8]
    repeated = small.repeat(4, 1).repeat(4, 2)
    np.testing.assert_array_equal(pool(small, 32, 32), repeated)
    for size in (3, 7, 32, 64):
        constant = pool(jnp.full((1, 5, 5, 1), 2.5), size, size)
        np.testing.assert_allclose(constant, 2.5, rtol=1e-6)
    line = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 1, 4, 1))
    wanted = [0, 0.5, 1, 1.5, 2, 2.5, 3]
    np.testing.assert_allclose(pool(line, 7, 7)[0, :, 0, 0], wanted)
    np.testing.assert_allclose(pool(line, 8, 2)[0, :, 0, 0], np.arange(4).repeat(2))


PAIRS = {
    "wrn": (((32, 32), (64, 16), (128, 8)), 6, 2, 543_488),
    "resnet": (((16, 32), (32, 16), (64, 8)), 9, 3, 643_200),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_9_parameter_counts(pair):
    stages, theirs, ours, wanted = PAIRS[pair]

    def shapes(count):
        return [
            jax.ShapeDtypeStruct((2, channels), jnp.float32)
            for channels, _ in stages
            for _ in range(count)
        ]

    module = attention_lib.Similarity(128)
    init = functools.partial(module.init, train=True)
    made = jax.eval_shape(init, KEY, shapes(theirs), shapes(ours))
    assert sum(x.size for x in jax.tree.leaves(made["params"])) == wanted


@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_10_zero_maps_give_finite_losses_and_gradients(dead):
    teacher = tap_toys.taps(tap_toys.TEACHER, 9)
    student = tap_toys.taps(tap_toys.STUDENT, 10)
    if dead != "teacher":
        student = (jnp.zeros_like(student[0]), *student[1:])
    if dead != "student":
        teacher = (jnp.zeros_like(teacher[0]), *teacher[1:])
    variables = similarity(teacher, student)
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 2)))(
        variables, teacher, student
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))
    summed = attention_lib.distances(student, teacher, "sum")[:, 0, 0]
    np.testing.assert_allclose(summed, 0 if dead == "both" else 1, atol=1e-5)


# The method


def test_terms_weights_and_diagnostics():
    made = tap_toys.signals(
        tap_toys.taps(tap_toys.STUDENT, 1), tap_toys.taps(tap_toys.TEACHER, 2)
    )
    module = distill.create("afd", OPTIONS)
    variables = module.init(KEY, made, train=True)
    (found,), _ = module.apply(variables, made, train=True, mutable=["batch_stats"])
    assert set(variables["params"]) == {"module1"}
    ce = kd.cross_entropy(made.student.logits, made.labels)
    divergence = kd.kd_loss(made.student.logits, made.teacher.logits, 4.0)
    inner = {name: tree["module1"] for name, tree in variables.items()}
    distance = loss(inner, made.teacher.taps, made.student.taps)
    wanted = ce + 0.9 * divergence + 200 * distance
    assert found.total() == pytest.approx(float(wanted), rel=1e-5)
    assert set(found.terms) == {"head_ce", "head_kd", "afd"}
    diagnostics = found.diagnostics
    assert set(diagnostics) == {
        "attention_entropy",
        "attention_stage1",
        "attention_stage2",
    }
    shares = diagnostics["attention_stage1"] + diagnostics["attention_stage2"]
    assert shares == pytest.approx(1, rel=1e-5)
    assert 0 < diagnostics["attention_entropy"] <= np.log(3) + 1e-6


def test_diagnostics_by_hand():
    attention = jnp.array([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    found = attention_lib.attention_diagnostics(attention, ((0, 2), (1,)))
    assert found["attention_entropy"] == pytest.approx(np.log(2) / 2)
    assert found["attention_stage1"] == pytest.approx(0.75)
    assert found["attention_stage2"] == pytest.approx(0.25)


def test_taps_in_another_order_than_their_sizes():
    mixed = tap_toys.taps(((8, 3), (4, 3), (8, 3)), 1)
    student = tap_toys.taps(((8, 3),), 2)
    table = attention_lib.distances(student, mixed, "sum")
    for index, tap in enumerate(mixed):
        alone = attention_lib.distances(student, (tap,), "sum")
        np.testing.assert_allclose(table[..., index], alone[..., 0], rtol=1e-6)


def test_networks_without_taps_are_refused():
    made = tap_toys.signals(tap_toys.taps(tap_toys.STUDENT, 1), ())
    module = distill.create("afd", OPTIONS)
    with pytest.raises(ValueError, match="teacher: this network records no taps"):
        module.init(KEY, made, train=True)


def test_bfloat16_taps_give_float32_losses():
    student, teacher = (
        tuple(t.astype(jnp.bfloat16) for t in tap_toys.taps(shapes, 3))
        for shapes in (tap_toys.STUDENT, tap_toys.TEACHER)
    )
    attention, distances = attend(similarity(teacher, student), teacher, student)
    assert attention.dtype == distances.dtype == jnp.float32
    exact = attention_lib.distances(
        *(tuple(t.astype(jnp.float32) for t in taps) for taps in (student, teacher)),
        "mean",
    )
    np.testing.assert_allclose(distances, exact, rtol=1e-5)


EVERY_FAMILY = ["cifar_resnet50", "resnet18", "vgg8", "mobilenet_v1", "mobilenet_v2"]
EVERY_FAMILY += ["mobilenet_v2_imagenet", "shuffle_v1", "wrn_10_1", "hme"]


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_afd_takes_every_family(name):
    student = models.create(name, num_classes=4)
    teacher = models.create("resnet8", num_classes=4)
    module = distill.create("afd", OPTIONS)

    def run(images):
        ours, theirs = (
            m.init_with_output(KEY, images, train=False)[0] for m in (student, teacher)
        )
        made = tap_toys.signals(ours.taps, theirs.taps)
        return ours, module.init_with_output(KEY, made, train=True)

    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    ours, ((found,), variables) = jax.eval_shape(run, images)
    assert len(ours.taps) == sum(student.stage_sizes)
    assert {t.ndim for t in ours.taps} == {4}
    assert found.terms["afd"].shape == ()
    positions = variables["params"]["module1"]["key_positions"]
    assert positions.shape == (len(ours.taps), 8)
