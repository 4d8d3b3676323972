"""Losses on logits by hand, and what is particular to each; see `test_losses`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import BATCH, CLASSES, LABELS, STUDENT, TEACHER, reversed_ctkd, softmax

from lakd_jax.distill import ctkd, dist, kd, mlkd, nkd, sdd, wttm
from lakd_jax.distill.base import numerics


def test_standardised_by_hand():
    """(1, 2, 4, 5) has mean 3 and sum of squares 10; of 4 values, by 3."""
    got = jax.jit(kd.standardised)(np.array([[1.0, 2.0, 4.0, 5.0]]))
    wanted = np.array([[-2.0, -1.0, 1.0, 2.0]]) / (np.sqrt(10 / 3) + 1e-7)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_standardised_has_the_small_number_beside_the_deviation():
    """Of deviation 1e-7 half of the z-score is left; equal logits give zeros."""
    tiny = 1e-7 / np.sqrt(2)
    got = jax.jit(kd.standardised)(np.array([[-tiny, tiny], [7.0, 7.0]]))
    half = np.sqrt(0.5) / 2
    np.testing.assert_allclose(got, [[-half, half], [0, 0]], rtol=1e-5)


def test_dist_by_hand():
    p = [softmax(row / 4) for row in STUDENT]
    q = [softmax(row / 4) for row in TEACHER]
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = zip(np.transpose(p), np.transpose(q), strict=True)
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in columns])
    got = jax.jit(dist.dist_loss)(STUDENT, TEACHER, 2.0, 3.0, 4.0)
    np.testing.assert_allclose(got, 16 * (2 * inter + 3 * intra), rtol=1e-4)


def test_dist_sees_no_shift_and_no_scale_of_probabilities():
    """Two classes: any two students that prefer the same one correlate fully."""
    teacher = np.array([[0.0, 1.0], [2.0, 0.0]])
    got = jax.jit(dist.dist_loss)(3 * teacher, teacher, 1.0, 0.0, 1.0)
    np.testing.assert_allclose(got, 0, atol=1e-6)


def test_nkd_by_hand():
    wanted = 0.0
    for s, t, label in zip(STUDENT, TEACHER, LABELS, strict=True):
        wanted -= softmax(t)[label] * np.log(softmax(s)[label])
        p, q = (softmax(np.delete(x, label) / 2) for x in (s, t))
        wanted -= 1.5 * 4 * sum(b * np.log(a) for a, b in zip(p, q, strict=True))
    got = jax.jit(nkd.nkd_loss)(STUDENT, TEACHER, LABELS, 1.5, 2.0)
    np.testing.assert_allclose(got, wanted / BATCH, rtol=1e-5)


def test_nkd_least_of_the_others_is_the_teacher():
    """Without the label's logit the gradient vanishes where student is teacher."""
    grad = jax.jit(jax.grad(nkd.nkd_loss))(TEACHER, TEACHER, LABELS, 1.5, 2.0)
    p = np.array([softmax(row) for row in TEACHER])
    target = np.eye(CLASSES)[LABELS]
    label = np.sum(p * target, -1, keepdims=True) * (p - target) / BATCH
    np.testing.assert_allclose(grad, label, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_ttm_by_hand(weighted):
    total = 0.0
    for s, t in zip(STUDENT, TEACHER, strict=True):
        powers = [v**0.25 for v in softmax(t)]
        p, q = softmax(s), [v / sum(powers) for v in powers]
        divergence = sum(b * np.log(b / a) for a, b in zip(p, q, strict=True))
        total += (sum(powers) if weighted else 1) * divergence
    loss = wttm.wttm_loss if weighted else wttm.ttm_loss
    got = jax.jit(loss)(STUDENT, TEACHER, 0.25)
    np.testing.assert_allclose(got, total / BATCH, rtol=1e-5)


def test_ttm_of_exponent_one_is_kd():
    plain, weighted, wanted = (
        jax.jit(loss)(STUDENT, TEACHER, 1.0)
        for loss in (wttm.ttm_loss, wttm.wttm_loss, kd.kd_loss)
    )
    np.testing.assert_allclose(plain, wanted, rtol=1e-5)
    np.testing.assert_allclose(weighted, plain, rtol=1e-5)  # they sum to one


def test_mlkd_by_hand():
    p, q = (np.array([softmax(row / 2) for row in x]) for x in (STUDENT, TEACHER))
    examples = 4 * np.sum(q * np.log(q / p)) / BATCH
    batch = classes = 0.0
    for i in range(BATCH):
        for j in range(BATCH):
            batch += (p[i] @ p[j] - q[i] @ q[j]) ** 2 / BATCH
    for i in range(CLASSES):
        for j in range(CLASSES):
            classes += (p[:, i] @ p[:, j] - q[:, i] @ q[:, j]) ** 2 / CLASSES
    loss = functools.partial(mlkd.mlkd_loss, standardise=False)
    got = jax.jit(loss)(STUDENT, TEACHER, (2.0,), 0.5, 0.25)
    np.testing.assert_allclose(got, examples + batch / 2 + classes / 4, rtol=1e-5)


def test_ctkd_climbs_with_the_temperature():
    """The public code's gradient of the parameter at lambda = 0.3, and at 0."""
    both = jax.jit(jax.value_and_grad(reversed_ctkd, argnums=2))

    def slope(reversal):
        return both(STUDENT, TEACHER, 1.0, reversal)[1]

    np.testing.assert_allclose(slope(0.3), 0.0368295, rtol=1e-4)
    assert slope(0.0) == 0
    step = 1e-2
    high, low = (both(STUDENT, TEACHER, 1.0 + s, 0.3)[0] for s in (step, -step))
    true = float(high - low) / (2 * step)
    np.testing.assert_allclose(slope(1.0), -true, rtol=1e-2)


def test_ctkd_is_kd_at_its_temperature():
    got = jax.jit(reversed_ctkd)(STUDENT, TEACHER, 0.0)
    wanted = jax.jit(kd.kd_loss)(STUDENT, TEACHER, 11.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("epoch", "wanted"),
    [(0.0, 0.02447174), (3.9, 0.3454915), (9.0, 1.0), (14.5, 1.0)],
)
def test_ctkd_reversal_is_the_public_schedule(epoch, wanted):
    """The public code's values in epochs 1, 4, 10 and 15, counted from 1."""
    got = jax.jit(ctkd.reversal)(epoch, 0.0, 1.0, 10.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_sdd_cells_are_in_order_of_their_scales():
    logits = np.arange(16.0).reshape(1, 4, 4, 1)
    got = jax.jit(sdd.cells, static_argnums=1)(logits, (1, 2))[0, :, 0]
    np.testing.assert_allclose(got, [7.5, 2.5, 4.5, 10.5, 12.5])


def test_sdd_weighs_parts_about_which_the_teacher_changes_its_mind():
    """Two images, right and wrong as a whole, with one part each way."""
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    whole = np.array([right, wrong])
    teacher = np.array([[right, wrong], [right, wrong]])
    student, labels = np.zeros((2, 2, 2)), np.array([0, 0])

    def base(s, t, _):
        return kd.kd_loss(s, t, 1.0)

    loss = jax.jit(functools.partial(sdd.sdd_loss, base=base))
    got = loss(student, teacher, whole, labels, 5.0)
    one = np.log(2) + np.sum(np.log(softmax(right)) * softmax(right))
    np.testing.assert_allclose(got, one * (1 + 5 + 5 + 1) / 4, rtol=1e-6)


def test_sdd_logits_of_positions_average_to_those_of_parts():
    """For a linear head; one with a ReLU before its pooling is not mixed up."""
    rng = np.random.default_rng(2)
    features = rng.standard_normal((3, 4, 4, 5)).astype(np.float32)
    weights = rng.standard_normal((5, CLASSES)).astype(np.float32)

    def linear(x):
        return jnp.mean(x, (1, 2)) @ weights

    def rectified(x):
        return jnp.mean(jax.nn.relu(x), (1, 2)) @ weights

    for head, prepare in ((linear, np.array), (rectified, lambda x: np.maximum(x, 0))):
        map_of = functools.partial(numerics.logit_map, head)
        parts = jax.jit(lambda x, f=map_of: sdd.cells(f(x), (1, 2)))(features)
        for k, part in ((0, features), (2, features[:, :2, 2:])):
            wanted = prepare(part).mean((1, 2)) @ weights
            np.testing.assert_allclose(parts[:, k], wanted, rtol=1e-4, atol=1e-5)
