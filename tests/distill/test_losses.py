"""All losses on logits and features: public values, least values, what they ignore.

The cases are those of `loss_cases`; what is particular to one loss follows by hand.
"""

import functools

import golden_weights
import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import precision
import pytest

from lakd_jax.distill import cd, dkd, fsp, kd, kdpp, ofd, rkd

CASES = loss_cases.CASES


@functools.cache
def program(name):
    """(student, teacher) -> value and both gradients, of the shapes of the case."""
    return jax.jit(jax.value_and_grad(CASES[name].loss, argnums=(0, 1)))


@functools.cache
def answer(name):
    case = CASES[name]
    return jax.device_get(program(name)(case.student, case.teacher))


def length(grad):
    return np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(grad)])


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_public_ones(name):
    case, (value, (grad, _)) = CASES[name], answer(name)
    grads = jax.tree.leaves(grad)
    assert value.dtype == jnp.float32 and value.shape == ()
    np.testing.assert_allclose(value, case.value, rtol=case.rtol)
    for own, public in zip(grads, case.grads or grads, strict=True):
        assert golden_weights.distance(own, public) < 1e-4
    norms = [np.linalg.norm(own) for own in grads]
    np.testing.assert_allclose(norms, case.norms or norms, rtol=1e-4)
    if case.along:
        way, along = case.along
        np.testing.assert_allclose(np.sum(grad * way), along, rtol=1e-4)
    assert case.grads or case.norms


@pytest.mark.parametrize("name", CASES)
def test_teacher_gets_no_gradient_and_the_student_one(name):
    _, (ours, theirs) = answer(name)
    assert all(np.any(g) for g in jax.tree.leaves(ours))
    assert not any(np.any(g) for g in jax.tree.leaves(theirs))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.least])
def test_least_where_student_is_teacher(name):
    """Promise 26: the known minimum, where the gradient vanishes."""
    value, (grad, _) = program(name)(*CASES[name].least)
    elsewhere, (slope, _) = answer(name)
    assert value < elsewhere
    assert abs(value) < 1e-6 * max(1, elsewhere)
    if name != "ft_factor":  # absolute values have no gradient at their minimum
        assert length(grad) < 1e-4 * length(slope)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_taken_and_computed_in_float32(name):
    """Promise 24: nothing is computed, or rounded, in fewer bits."""
    case = CASES[name]
    found = precision.arithmetic(
        case.loss, *precision.halves((case.student, case.teacher))
    )
    # Maps are pooled in the type of the network's head, here bfloat16.
    assert found == {"float32"} | ({"bfloat16"} if "sdd" in name else set())


@pytest.mark.parametrize(
    ("name", "rtol"),
    [  # two programs round differently; bfloat16 would be 4e-3 off
        *(("dkd_a1_b8_t4", 1e-5), ("pkt", 1e-5), ("sp/feat_teacher", 1e-5)),
        *(("wttm", 1e-6), ("sdd_kd_2", 2e-2)),
    ],
)
def test_values_of_bfloat16_are_those_of_the_rounded_inputs(name, rtol):
    both = CASES[name].student, CASES[name].teacher
    halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), both)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), halves)
    got, (wanted, _) = jax.jit(CASES[name].loss)(*halves), program(name)(*rounded)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=rtol)


@pytest.mark.parametrize("name", CASES)
def test_never_negative(name):
    rng = np.random.default_rng(0)
    for size in (0.1, 10.0, 10.0, 10.0):
        drawn = jax.tree.map(
            lambda x, s=size: (s * rng.standard_normal(x.shape)).astype(np.float32),
            (CASES[name].student, CASES[name].teacher),
        )
        assert float(program(name)(*drawn)[0]) >= -1e-6


@pytest.mark.parametrize("name", CASES)
def test_examples_that_are_the_same_give_finite_gradients(name):
    for ours, theirs in ((0, 0), (0, 1), (1, 2)):
        same, other = (
            jax.tree.map(lambda x, v=v: np.full(x.shape, v, np.float32), given)
            for v, given in ((ours, CASES[name].student), (theirs, CASES[name].teacher))
        )
        _, grads = program(name)(same, other)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", loss_cases.FLAT)
def test_sure_networks_give_finite_gradients(name):
    flat = np.zeros_like(loss_cases.STUDENT)
    sure = 1000 * np.eye(loss_cases.CLASSES, dtype=np.float32)[loss_cases.LABELS]
    for student, teacher in ((flat, sure), (sure, flat)):
        _, (grad, _) = program(name)(student, teacher)
        assert np.all(np.isfinite(grad))


# By hand


def test_dkd_by_hand():
    """One example, three classes: label 1/2 against 1/4, others 1:1 against 2:1."""
    student, teacher = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    tckd = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    nckd = 2 / 3 * np.log(2 / 3 * 2) + 1 / 3 * np.log(1 / 3 * 2)
    got = jax.jit(dkd.dkd_loss)(student, teacher, np.array([0]), 2.0, 3.0, 1.0)
    np.testing.assert_allclose(got, 2 * tckd + 3 * nckd, rtol=1e-5)


def test_dkd_of_equal_weights_is_kd():
    """Equation 6: KD is TCKD + (1 - p_t) NCKD, here of one example."""
    student, teacher, labels = (
        loss_cases.INPUTS[n][:1] for n in ("logits_student", "logits_teacher", "labels")
    )
    rest = 1 - np.exp(teacher[0, labels[0]]) / np.sum(np.exp(teacher))
    got = jax.jit(dkd.dkd_loss)(student, teacher, labels, 1.0, rest, 1.0)
    wanted = jax.jit(kd.kd_loss)(student, teacher, 1.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_rkd_by_hand():
    """Three examples on a line, the middle one moved; angles do not change."""
    teacher = np.array([[0.0], [1.0], [2.0]])
    student = np.array([[0.0], [3.0], [4.0]])
    mean_s, mean_t = (3 + 4 + 1) / 3, 4 / 3
    ratios = [
        (3 / mean_s, 1 / mean_t),
        (4 / mean_s, 2 / mean_t),
        (1 / mean_s, 1 / mean_t),
    ]
    wanted = sum(2 * 0.5 * (a - b) ** 2 for a, b in ratios) / 9
    got = jax.jit(rkd.rkd_loss)(student, teacher, 1.0, 1.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_fsp_refuses_other_widths():
    with pytest.raises(ValueError, match="16 with 24"):
        fsp.fsp_loss(*map(loss_cases.stages, ("student", "teacher_wide")))


def test_margins_broadcast():
    case, margin = CASES["ofd_feat_loss"], loss_cases.MARGIN[None, None, None]
    got = jax.jit(ofd.margin_loss)(case.student, case.teacher, margin)
    np.testing.assert_allclose(got, answer("ofd_feat_loss")[0], rtol=1e-6)


def test_the_guided_part_is_kd_of_what_the_teacher_gets_right():
    student, teacher = loss_cases.GUIDED
    run = jax.jit(jax.value_and_grad(cd.guided_kd_loss))
    got, grad = run(student, teacher, loss_cases.GUIDED_LABELS, 4.0)
    np.testing.assert_allclose(
        got, kd.kd_loss(student[:3], teacher[:3], 4.0), rtol=1e-5
    )
    assert np.all(np.any(grad[:3], -1)) and not np.any(grad[3:])
    wrong = (np.argmax(teacher, -1) + 1) % 4
    value, grad = run(student, teacher, wrong, 4.0)
    assert value == 0 and not np.any(grad)


def test_scales_of_class_maps_matter_only_unless_normalised():
    _, teacher = loss_cases.CAMS
    both = 2 * teacher, teacher
    assert program("catkd")(*both)[0] > 0.01
    assert program("catkd_normalise")(*both)[0] < 1e-12


nd_loss = jax.jit(jax.value_and_grad(kdpp.nd_loss, argnums=(0, 1, 2)))


def test_nd_example_by_example():
    (students, teachers), centres = loss_cases.ND, loss_cases.ND_CENTRES
    values = []
    for s, t, c in zip(students, teachers, centres, strict=True):
        cosine = s @ c / np.linalg.norm(s) / np.linalg.norm(c)
        values.append(1 - cosine * min(1, np.linalg.norm(s) / np.linalg.norm(t)))
    got, (*_, of_centres) = nd_loss(students, teachers, centres)
    np.testing.assert_allclose(got, np.mean(values), rtol=1e-5)
    assert not np.any(of_centres)


def test_nd_is_least_where_features_point_to_their_centre_and_are_long_enough():
    (_, teachers), centres = loss_cases.ND, loss_cases.ND_CENTRES
    towards = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    lengths = np.linalg.norm(teachers, axis=1, keepdims=True)
    for factor, least in ((1.0, 0.0), (3.0, 0.0), (0.25, 0.75)):
        value, _ = nd_loss(np.float32(factor) * lengths * towards, teachers, centres)
        np.testing.assert_allclose(value, least, atol=1e-6)


def test_nd_of_a_class_without_a_centre_is_one_without_gradient():
    (students, teachers), zeros = loss_cases.ND, np.zeros_like(loss_cases.ND_CENTRES)
    value, (grad, *_) = nd_loss(students, teachers, zeros)
    assert value == 1 and not np.any(grad)
    assert np.all(np.isfinite(nd_loss(zeros, zeros, zeros)[1][0]))
