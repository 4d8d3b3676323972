"""Losses on logits alone: public code's values, least values, what they ignore.

The constants were computed with the public PyTorch code of each method on these inputs:
the value, the gradient's norm, and its product with `WAY`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest

from lakd_jax.distill import ctkd, dist, dkd, kd, mlkd, nkd, sdd, wttm
from lakd_jax.distill.base import numerics

BATCH, CLASSES = 12, 10


def _inputs():
    """Logits, labels and logit maps of which the teacher is right about a half."""
    rng = np.random.default_rng(0)
    student, teacher = (
        (3 * rng.standard_normal((BATCH, CLASSES))).astype(np.float32) for _ in "st"
    )
    labels = rng.integers(0, CLASSES, BATCH)
    known = np.arange(0, BATCH, 2)
    teacher[known, labels[known]] += 8
    way = rng.standard_normal((BATCH, CLASSES)).astype(np.float32)
    shape = (BATCH, 4, 4, CLASSES)
    maps = [(2 * rng.standard_normal(shape)).astype(np.float32) for _ in "st"]
    maps[1][np.arange(BATCH), 1, 1, labels] += 6
    maps[1][known, :, :, labels[known]] += 2
    map_way = rng.standard_normal(shape).astype(np.float32)
    return student, teacher, labels.astype(np.int32), way, *maps, map_way


STUDENT, TEACHER, LABELS, WAY, STUDENT_MAP, TEACHER_MAP, MAP_WAY = _inputs()


def _kd_standardised(student, teacher):
    return kd.kd_loss(kd.standardised(student), kd.standardised(teacher), 2.0)


def _nkd(student, teacher):
    return nkd.nkd_loss(student, teacher, LABELS, gamma=1.5, temperature=2.0)


def reversed_ctkd(student, teacher, raw=1.0, reversal=0.3):
    return ctkd.ctkd_loss(student, teacher, jnp.float32(raw), reversal, 1.0, 20.0)


BASES = {
    "kd": lambda student, teacher, _: kd.kd_loss(student, teacher, 4.0),
    "dkd": functools.partial(dkd.dkd_loss, alpha=1.0, beta=8.0, temperature=4.0),
    "nkd": functools.partial(nkd.nkd_loss, gamma=1.5, temperature=2.0),
}


def _sdd(student, teacher, base, scales):
    whole = jnp.mean(teacher, (1, 2))
    ours, theirs = sdd.cells(student, scales), sdd.cells(teacher, scales)
    return sdd.sdd_loss(ours, theirs, whole, LABELS, 2.0, BASES[base])


def _dist(**options):
    return functools.partial(dist.dist_loss, **options)


def _mlkd(standardise):
    return functools.partial(
        mlkd.mlkd_loss,
        temperatures=(2.0, 3.0, 4.0),
        batch_weight=1.0,
        class_weight=1.0,
        standardise=standardise,
    )


def _ttm(loss, exponent):
    return functools.partial(loss, exponent=exponent)


# The loss of (student, teacher); its value, and of its gradient |g| and <g, way>.
FLAT = {
    "ttm": (_ttm(wttm.ttm_loss, 0.1), 2.442241, 0.17697, 0.0492715),
    "wttm": (_ttm(wttm.wttm_loss, 0.2), 9.101264, 0.690459, 0.314296),
    "dist_t4": (
        _dist(beta=2.0, gamma=0.5, temperature=4.0),
        42.60561,
        1.34083,
        1.4565,
    ),
    "dist_t1": (
        _dist(beta=1.0, gamma=2.0, temperature=1.0),
        3.202516,
        0.136602,
        0.182592,
    ),
    "nkd": (_nkd, 21.03725, 0.608093, 0.335692),
    "mlkd": (_mlkd(False), 30.73525, 1.39056, 1.31788),
    "mlkd_standardised": (_mlkd(True), 4.03967, 0.127431, 0.09457),
    "kd_standardised": (_kd_standardised, 0.9901001, 0.0345751, 0.0334543),
    "ctkd": (reversed_ctkd, 10.64532, 0.428619, 0.285199),
}
PARTS = {
    ("kd", (1, 2)): (1.148176, 0.0387953, 0.0381737),
    ("dkd", (1, 2)): (7.687205, 0.287933, 0.0979964),
    # With the one line of that copy of NKD changed which keeps the label.
    ("nkd", (1, 2)): (17.67877, 0.0671849, 0.0325995),
    ("kd", (1, 2, 4)): (4.44405, 0.0800077, 0.11342),
    ("dkd", (1, 2, 4)): (34.18816, 0.653257, 0.989995),
    ("nkd", (1, 2, 4)): (22.52217, 0.131324, 0.208638),
}
CASES = {name: (loss, STUDENT, TEACHER, WAY, *v) for name, (loss, *v) in FLAT.items()}
for (base, scales), values in PARTS.items():
    loss = functools.partial(_sdd, base=base, scales=scales)
    CASES[f"sdd_{base}_{scales[-1]}"] = (
        loss,
        STUDENT_MAP,
        TEACHER_MAP,
        MAP_WAY,
        *values,
    )


@functools.cache
def program(name):
    """(student, teacher) -> value and both gradients, of the shapes of the case."""
    return jax.jit(jax.value_and_grad(CASES[name][0], argnums=(0, 1)))


@functools.cache
def answer(name):
    return jax.device_get(program(name)(*CASES[name][1:3]))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_public_ones(name):
    _, _, _, way, value, norm, along = CASES[name]
    got, (grad, theirs) = answer(name)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(grad), norm, rtol=1e-4)
    np.testing.assert_allclose(np.sum(grad * way), along, rtol=1e-4)
    assert not np.any(theirs)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_taken_and_computed_in_float32(name):
    loss, *both = CASES[name][:3]
    found = precision.arithmetic(loss, *precision.halves(both))
    # Maps are pooled in the type of the network's head, here bfloat16.
    assert found == {"float32"} | ({"bfloat16"} if both[0].ndim > 2 else set())


@pytest.mark.parametrize(("name", "rtol"), [("wttm", 1e-6), ("sdd_kd_2", 2e-2)])
def test_values_of_bfloat16_are_those_of_the_rounded_inputs(name, rtol):
    loss, *both = CASES[name][:3]
    halves = [jnp.asarray(x, jnp.bfloat16) for x in both]
    rounded = [np.asarray(x, np.float32) for x in halves]
    got, (wanted, _) = jax.jit(loss)(*halves), program(name)(*rounded)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=rtol)


@pytest.mark.parametrize("name", [n for n in CASES if "nkd" not in n])
def test_least_where_student_is_teacher(name):
    _, _, teacher, _, _, norm, _ = CASES[name]
    same = teacher
    if name.endswith("ttm"):  # there the student is the softened teacher
        log_q = np.log([softmax(row) for row in teacher])
        same = np.float32((0.1 if name == "ttm" else 0.2) * log_q)
    value, (grad, _) = program(name)(same, teacher)
    assert abs(float(value)) < 1e-5 * float(answer(name)[0])
    assert np.linalg.norm(grad) < 1e-4 * norm


@pytest.mark.parametrize("name", CASES)
def test_never_negative(name):
    rng = np.random.default_rng(1)
    for size in (0.1, 10.0):
        drawn = size * rng.standard_normal((2, *CASES[name][1].shape))
        assert float(program(name)(*drawn.astype(np.float32))[0]) >= -1e-5


@pytest.mark.parametrize("name", FLAT)
def test_equal_logits_and_sure_teachers_give_finite_gradients(name):
    flat = np.zeros((BATCH, CLASSES), np.float32)
    sure = 1000 * np.eye(CLASSES, dtype=np.float32)[LABELS]
    for student, teacher in ((flat, flat), (flat, sure), (sure, flat)):
        _, (grad, _) = program(name)(student, teacher)
        assert np.all(np.isfinite(grad))


def softmax(row):
    powers = [np.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


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
    np.testing.assert_allclose(answer("nkd")[0], wanted / BATCH, rtol=1e-5)


def test_nkd_least_of_the_others_is_the_teacher():
    """Without the label's logit the gradient vanishes where student is teacher."""
    _, (grad, _) = program("nkd")(TEACHER, TEACHER)
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
