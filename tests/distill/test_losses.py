"""The losses of other methods: golden values, what each is least, what it ignores.

Golden values were computed with mdistiller's and RepDistiller's loss files in PyTorch.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest

from lakd_jax.distill import (
    at,
    cc,
    dkd,
    fsp,
    ft,
    kd,
    nst,
    ofd,
    pkt,
    review,
    rkd,
    sp,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
INPUTS = dict(np.load(GOLDEN / "losses_inputs.npz"))
LOSSES = dict(np.load(GOLDEN / "losses.npz"))


def nhwc(x):
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def stages(name):
    return [nhwc(INPUTS[f"feat_{name}_{i}"]) for i in range(3)]


def inputs(name):
    return nhwc(INPUTS[name])


def _dkd(student, teacher, beta, temperature):
    labels = jnp.asarray(INPUTS["labels"])
    return dkd.dkd_loss(student, teacher, labels, 1.0, beta, temperature)


def _margin(student, teacher):
    return ofd.margin_loss(student, teacher, INPUTS["ofd_margin"][:, 0, 0])


LOGITS = (inputs("logits_student"), inputs("logits_teacher"))
POOLED = (inputs("pooled_student"), inputs("pooled_teacher"))
AT = functools.partial(at.at_loss, p=2)
RKD = functools.partial(rkd.rkd_loss, distance_weight=25.0, angle_weight=50.0)
# By golden name: the loss of (student, teacher), and these.
CASES = {
    "dkd_a1_b8_t4": (functools.partial(_dkd, beta=8.0, temperature=4.0), *LOGITS),
    "dkd_a1_b2_t1": (functools.partial(_dkd, beta=2.0, temperature=1.0), *LOGITS),
    "rkd_d25_a50": (RKD, *POOLED),
    "pkt": (pkt.pkt_loss, *POOLED),
    "cc": (cc.cc_loss, inputs("pooled_student"), inputs("pooled_teacher_same")),
    "hcl": (review.hcl_loss, stages("student"), stages("teacher")),
    "fsp_sum": (fsp.fsp_loss, stages("student"), stages("teacher")),
    "ft_factor": (
        ft.factor_loss,
        inputs("feat_student_2"),
        inputs("feat_teacher_2"),
    ),
    "ofd_feat_loss": (
        _margin,
        inputs("ofd_student_connected"),
        inputs("ofd_teacher_preact"),
    ),
}
for kind in ("teacher", "teacher_wide", "teacher_small"):
    both = (stages("student"), stages(kind))
    CASES[f"at_p2/feat_{kind}"] = (AT, *both)
    CASES[f"nst/feat_{kind}"] = (nst.nst_loss, *both)
    CASES[f"sp/feat_{kind}"] = (sp.sp_loss, both[0][-1], both[1][-1])


def relative(ours, golden):
    golden = np.asarray(golden, np.float64)
    return np.linalg.norm(np.asarray(ours) - golden) / np.linalg.norm(golden)


@functools.cache
def program(name):
    """(student, teacher) -> value and both gradients, of the shapes of the case."""
    return jax.jit(jax.value_and_grad(CASES[name][0], argnums=(0, 1)))


@functools.cache
def answer(name):
    return jax.device_get(program(name)(*CASES[name][1:]))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_public_ones(name):
    value, (grad, _) = answer(name)
    assert value.dtype == jnp.float32 and value.shape == ()
    assert relative(value, LOSSES[name]) < 1e-4
    grads = grad if isinstance(grad, list) else [grad]
    names = [f"grad_s{i}" for i in range(3)] if len(grads) > 1 else ["grad_s"]
    for own, key in zip(grads, names, strict=True):
        assert relative(own, nhwc(LOSSES[f"{name}/{key}"])) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_teacher_gets_no_gradient_and_the_student_one(name):
    _, (ours, theirs) = answer(name)
    assert all(np.any(g) for g in jax.tree.leaves(ours))
    assert not any(np.any(g) for g in jax.tree.leaves(theirs))


@pytest.mark.parametrize(
    "name", [n for n in CASES if not n.endswith(("wide", "small"))]
)
def test_least_where_student_is_teacher(name):
    """Promise 26: the known minimum, with a finite gradient."""
    _, student, teacher = CASES[name]
    shapes = [np.shape(x) for x in jax.tree.leaves((student, teacher))]
    same = student if len(set(shapes)) > 1 else teacher
    if name == "ofd_feat_loss":  # the student has to reach the margin
        same = np.maximum(teacher, INPUTS["ofd_margin"][:, 0, 0])
    value, grad = program(name)(same, same)
    elsewhere = float(answer(name)[0])
    assert abs(float(value)) < 1e-6 * max(1, elsewhere)
    assert float(value) < elsewhere
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grad))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_taken_and_computed_in_float32(name):
    """Promise 24: nothing is computed, or rounded, in fewer bits."""
    loss, *both = CASES[name]
    assert precision.arithmetic(loss, *precision.halves(both)) == {"float32"}


@pytest.mark.parametrize("name", ["dkd_a1_b8_t4", "pkt", "sp/feat_teacher"])
def test_values_of_bfloat16_are_those_of_the_rounded_inputs(name):
    loss, *both = CASES[name]
    halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), both)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), halves)
    got, (wanted, _) = jax.jit(loss)(*halves), program(name)(*rounded)
    assert got.dtype == jnp.float32
    # Two programs round differently; bfloat16 would be 4e-3 off.
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_never_negative(name):
    rng = np.random.default_rng(0)

    def noise(x):
        return np.asarray(10 * rng.standard_normal(x.shape), np.float32)

    for _ in range(5):
        drawn = jax.tree.map(noise, CASES[name][1:])
        assert float(program(name)(*drawn)[0]) >= -1e-6


def test_dkd_by_hand():
    """One example, three classes: label 1/2 against 1/4, others 1:1 against 2:1."""
    student, teacher = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    tckd = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    nckd = 2 / 3 * np.log(2 / 3 * 2) + 1 / 3 * np.log(1 / 3 * 2)
    got = jax.jit(dkd.dkd_loss)(student, teacher, np.array([0]), 2.0, 3.0, 1.0)
    np.testing.assert_allclose(got, 2 * tckd + 3 * nckd, rtol=1e-5)


def test_dkd_of_equal_weights_is_kd():
    """Equation 6: KD is TCKD + (1 - p_t) NCKD, here of one example."""
    student, teacher, labels = (x[:1] for x in (*LOGITS, INPUTS["labels"]))
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


@pytest.mark.parametrize(
    ("name", "value"),
    [("rkd_d25_a50", 1), ("pkt", 1), ("at_p2/feat_teacher", 0), ("sp/feat_teacher", 0)],
)
def test_examples_that_are_the_same_give_finite_gradients(name, value):
    same, other = (
        jax.tree.map(lambda x, v=v: np.full(np.shape(x), v, np.float32), given)
        for v, given in zip((value, value + 1), CASES[name][1:], strict=True)
    )
    _, grads = program(name)(same, other)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_fsp_refuses_other_widths():
    with pytest.raises(ValueError, match="16 with 24"):
        fsp.fsp_loss(stages("student"), stages("teacher_wide"))


def test_margins_broadcast():
    student, teacher = CASES["ofd_feat_loss"][1:]
    margin = INPUTS["ofd_margin"][:, 0, 0]
    a = answer("ofd_feat_loss")[0]
    b = jax.jit(ofd.margin_loss)(student, teacher, margin[None, None, None])
    np.testing.assert_allclose(a, b, rtol=1e-6)
