"""AFD against the published code, and the properties of the project's notes (1-11)."""

import functools
import json

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
import tap_toys

from lakd_jax import distill
from lakd_jax.distill import afd, kd
from lakd_jax.distill import tap_attention as attention_lib

KEY = jax.random.key(0)


def run(variables, teacher, student, dim=8):
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


def answer(variables, teacher, student, dim=8):
    """(loss, (attention, distances))."""
    found = run(variables, teacher, student, dim)
    return afd.afd_loss(*found), found


alone = jax.jit(answer)
# The same, and the gradients of variables and taps.
whole = jax.jit(
    jax.value_and_grad(answer, argnums=(0, 1, 2), has_aux=True), static_argnums=3
)


def similarity(teacher, student, dim=8, seed=0):
    """Variables of the attention network for these taps."""
    ours, theirs = (
        [np.zeros((len(t), t.shape[-1]), np.float32) for t in taps]
        for taps in (student, teacher)
    )
    return tap_toys.variables(attention_lib.Similarity(dim), theirs, ours, seed=seed)


def loss(variables, teacher, student):
    return float(alone(variables, teacher, student)[0])


distances_of = jax.jit(attention_lib.distances, static_argnums=2)


@functools.cache
def standard(seed=0):
    """(variables, teacher, student) of the usual shapes."""
    teacher = tap_toys.taps(tap_toys.TEACHER, seed)
    student = tap_toys.taps(tap_toys.STUDENT, seed + 10)
    return similarity(teacher, student), teacher, student


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
        return tuple(golden[n].transpose(0, 2, 3, 1) for n in names)

    teacher, student = named("teacher", 4), named("student", 3)
    (value, (attention, _)), (_, _, gradients) = whole(
        golden_variables(), teacher, student, 128
    )
    assert golden_weights.distance(attention, golden["attention"]) < 1e-5
    assert golden_weights.distance(value, golden["loss"]) < 1e-5
    for index, gradient in enumerate(gradients):
        wanted = golden[f"grad_feat_student_{index}"].transpose(0, 2, 3, 1)
        assert golden_weights.distance(gradient, wanted) < 1e-4


# Properties, by their number


@pytest.mark.parametrize("seed", range(3))
def test_1_and_4_attention_sums_to_one_and_all_is_bounded(seed):
    (value, (attention, distances)), _ = whole(*standard(seed))
    attention, distances = np.asarray(attention), np.asarray(distances)
    assert attention.shape == (5, 4, 3) and distances.shape == (5, 3, 4)
    assert np.min(attention) >= 0
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert np.max(np.abs(attention.sum(1) - 4 / 3)) > 0.01
    limits = np.array([2 / side**2 for side, _ in tap_toys.TEACHER])
    assert np.min(distances) >= 0
    assert (distances <= limits + 1e-6).all()
    assert 0 <= value <= limits.sum()


def test_2_one_tap_each_is_the_plain_distance():
    (teacher, student) = tap_toys.taps(((4, 6), (8, 6)), 1)
    variables = similarity((teacher,), (student,))
    value, (attention, distances) = alone(variables, (teacher,), (student,))
    np.testing.assert_array_equal(attention, 1)
    assert value == pytest.approx(float(np.mean(distances)), rel=1e-6)
    mixed = distances_of((student[..., ::-1],), (teacher,), "mean")
    np.testing.assert_allclose(mixed, distances, rtol=1e-6)
    alike = similarity((teacher,), (teacher,))
    assert loss(alike, (teacher,), (teacher,)) == pytest.approx(0, abs=1e-7)
    scaled = proportional((teacher,), 2.5)
    assert loss(alike, (teacher,), scaled) == pytest.approx(0, abs=1e-7)


def test_3_identical_features_still_cost():
    taps = tap_toys.taps(((8, 4),) * 3, 2)
    variables = similarity(taps, taps)
    value, (_, distances) = alone(variables, taps, taps)
    diagonal = np.diagonal(distances, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal, 0, atol=1e-6)
    assert value > 1e-3
    same = (taps[0], 2 * taps[0], 3 * taps[0])
    assert loss(variables, same, same) == pytest.approx(0, abs=1e-6)


def test_5_distances_are_those_of_the_maps_written_out():
    """H W D = 2 - 2 cos, and both are the mean of squares by hand."""
    teacher, student = tap_toys.taps(((4, 3), (8, 5)), 4)
    pooled = np.asarray(student**2).mean(-1).reshape(5, 4, 2, 4, 2).mean((2, 4))
    f, g = (np.asarray(x).reshape(5, -1) for x in (pooled, (teacher**2).mean(-1)))
    f, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (f, g))
    got = distances_of((student,), (teacher,), "mean")[:, 0, 0]
    np.testing.assert_allclose(got, ((f - g) ** 2).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(16 * got, 2 - 2 * (f * g).sum(-1), rtol=1e-4)


def test_6_gradients_go_to_the_student_through_values_and_keys_alone():
    variables, teacher, student = standard(5)

    def parts(values, keys):
        attention, _ = run(variables, teacher, keys)
        _, distances = run(variables, teacher, values)
        return afd.afd_loss(attention, distances)

    through = jax.jit(jax.grad(parts, argnums=(0, 1)))(student, student)
    for way in through:
        assert all(tap_toys.largest(tap) > 1e-8 for tap in way)


def test_7_order_of_student_taps_does_not_matter():
    teacher = tap_toys.taps(tap_toys.TEACHER, 7)
    student = tap_toys.taps(((8, 4), (4, 8)), 8)
    variables = similarity(teacher, student)
    params = dict(variables["params"])
    params["key1"], params["key2"] = params["key2"], params["key1"]
    params["key_positions"] = params["key_positions"][::-1]
    halves = jax.tree.map(lambda x: x.reshape(2, -1)[::-1].ravel(), params["key_bn"])
    swapped = {**variables, "params": {**params, "key_bn": halves}}
    a, (attention, _) = alone(variables, teacher, student)
    b, (other, _) = alone(swapped, teacher, student[::-1])
    np.testing.assert_allclose(other, attention[..., ::-1], rtol=1e-4)
    assert a == pytest.approx(float(b), rel=1e-5)


PAIRS = {  # (side, channels) of each stage, and its blocks in teacher and student
    "wrn": (((32, 32), (16, 64), (8, 128)), 6, 2),
    "resnet": (((32, 16), (16, 32), (8, 64)), 9, 3),
}


@pytest.mark.parametrize(
    ("name", "pair", "wanted"),
    [
        ("afd", "wrn", 543_488),
        ("afd", "resnet", 643_200),
        ("rtk", "wrn", 342_272),
        ("rtk", "resnet", 341_376),
    ],
)
def test_9_parameter_counts(name, pair, wanted):
    stages, *counts = PAIRS[pair]
    theirs, ours = (
        tuple(
            jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
            for side, channels in stages
            for _ in range(count)
        )
        for count in counts
    )
    init = functools.partial(distill.create(name, {"qk_dim": 128}).init, train=True)
    made = jax.eval_shape(init, KEY, tap_toys.signals(ours, theirs))
    assert sum(x.size for x in jax.tree.leaves(made["params"])) == wanted


@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_10_zero_maps_give_finite_losses_and_gradients(dead):
    variables, teacher, student = standard(9)
    if dead != "teacher":
        student = (0 * student[0], *student[1:])
    if dead != "student":
        teacher = (0 * teacher[0], *teacher[1:])
    (value, (_, distances)), grads = whole(variables, teacher, student)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))
    summed = tap_toys.TEACHER[0][0] ** 2 * distances[:, 0, 0]
    np.testing.assert_allclose(summed, 0 if dead == "both" else 1, atol=1e-5)


# The method


@pytest.mark.parametrize(("name", "beta"), [("afd", 200.0), ("rtk", 4.0)])
def test_terms_weights_diagnostics_and_no_gradient_to_the_teacher(name, beta):
    student, teacher = standard()[:0:-1]
    signals = tap_toys.signals(student, teacher)
    module = distill.create(name, {"qk_dim": 8})
    variables = tap_toys.variables(module, signals)

    def total(outputs):
        seen = signals.replace(teacher=outputs)
        apply = functools.partial(module.apply, train=True, mutable=["batch_stats"])
        (found,), _ = apply(variables, seen)
        return found.total(), found

    both = jax.value_and_grad(total, has_aux=True)
    (value, found), gradient = jax.jit(both)(signals.teacher)
    assert tap_toys.largest(gradient) == 0
    assert set(found.terms) == {"head_ce", "head_kd", name}
    ours, theirs = signals.student.logits, signals.teacher.logits
    wanted = kd.cross_entropy(ours, signals.labels) + 0.9 * kd.kd_loss(ours, theirs, 4)
    wanted += beta * found.terms[name]
    assert value == pytest.approx(float(wanted), rel=1e-5)
    if name == "afd":
        inner = {kind: tree["module1"] for kind, tree in variables.items()}
        own = loss(inner, teacher, student)
        assert found.terms["afd"] == pytest.approx(own, rel=1e-5)
    entropy = found.diagnostics.pop("attention_entropy")
    assert 0 < entropy <= np.log(3) + 1e-6
    stages = {"afd": 2, "rtk": 3}[name]
    names = {f"attention_stage{k}" for k in range(1, stages + 1)}
    assert set(found.diagnostics) == names
    assert sum(found.diagnostics.values()) == pytest.approx(1, rel=1e-5)


def test_diagnostics_by_hand():
    attention = np.array([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    diagnose = jax.jit(attention_lib.attention_diagnostics, static_argnums=1)
    found = diagnose(attention, ((0, 2), (1,)))
    assert found["attention_entropy"] == pytest.approx(np.log(2) / 2)
    assert found["attention_stage1"] == pytest.approx(0.75)
    assert found["attention_stage2"] == pytest.approx(0.25)


def test_taps_in_another_order_than_their_sizes():
    mixed = tap_toys.taps(((8, 3), (4, 3), (8, 3)), 1)
    student = tap_toys.taps(((8, 3),), 2)
    table = distances_of(student, mixed, "sum")
    for index, tap in enumerate(mixed):
        alone = distances_of(student, (tap,), "sum")
        np.testing.assert_allclose(table[..., index], alone[..., 0], rtol=1e-6)


def test_networks_without_taps_are_refused():
    made = tap_toys.signals(tap_toys.taps(tap_toys.STUDENT, 1), ())
    module = distill.create("afd", {"qk_dim": 8})
    with pytest.raises(ValueError, match="teacher: this network records no taps"):
        module.init(KEY, made, train=True)


def test_bfloat16_taps_give_float32_losses():
    variables, *taps = standard()
    assert precision.arithmetic(run, variables, *precision.halves(taps)) == {"float32"}
