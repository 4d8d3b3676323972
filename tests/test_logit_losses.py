"""Losses on logits alone: public code's values, least values, what they ignore.

The constants were computed with the public PyTorch code of each method on these inputs:
the value, the gradient's norm, and its product with `WAY`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax import distill
from lakd_jax.distill import (
    ctkd,
    dist,
    dkd,
    kd,
    method,
    mlkd,
    nkd,
    relation,
    sdd,
    wttm,
)
from lakd_jax.models import chain

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
    return student, teacher, jnp.asarray(labels), way, *maps, map_way


STUDENT, TEACHER, LABELS, WAY, STUDENT_MAP, TEACHER_MAP, MAP_WAY = _inputs()


def _kd_standardised(student, teacher):
    return kd.kd_loss(kd.standardised(student), kd.standardised(teacher), 2.0)


def _nkd(student, teacher):
    return nkd.nkd_loss(student, teacher, LABELS, gamma=1.5, temperature=2.0)


def _ctkd(student, teacher, raw=1.0, reversal=0.3):
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
    "ctkd": (_ctkd, 10.64532, 0.428619, 0.285199),
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


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_public_ones(name):
    loss, student, teacher, way, value, norm, along = CASES[name]
    got, (grad, theirs) = jax.jit(jax.value_and_grad(loss, (0, 1)))(student, teacher)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(grad), norm, rtol=1e-4)
    np.testing.assert_allclose(np.sum(grad * way), along, rtol=1e-4)
    assert not np.any(theirs)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_taken_and_computed_in_float32(name):
    loss, student, teacher = CASES[name][:3]
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    rounded = [x.astype(jnp.float32) for x in halves]
    got, wanted = loss(*halves), loss(*rounded)
    assert got.dtype == jnp.float32
    # Maps are pooled in the type of the network's head, here bfloat16.
    np.testing.assert_allclose(got, wanted, rtol=2e-2 if student.ndim > 2 else 1e-6)


@pytest.mark.parametrize("name", [n for n in CASES if "nkd" not in n])
def test_least_where_student_is_teacher(name):
    loss, student, teacher = CASES[name][:3]
    if name.endswith("ttm"):  # there the student is the softened teacher
        log_q = np.asarray(jax.nn.log_softmax(teacher))
        same = (0.1 if name == "ttm" else 0.2) * log_q
    else:
        same = teacher
    value, grad = jax.value_and_grad(loss)(jnp.asarray(same), teacher)
    scale = float(loss(student, teacher))
    assert abs(float(value)) < 1e-5 * scale
    assert np.linalg.norm(grad) < 1e-4 * CASES[name][5]


@pytest.mark.parametrize("name", CASES)
def test_never_negative(name):
    loss, student = CASES[name][:2]
    rng = np.random.default_rng(1)
    for size in (0.1, 10.0):
        drawn = size * rng.standard_normal((2, *student.shape))
        assert float(loss(*drawn.astype(np.float32))) >= -1e-5


@pytest.mark.parametrize("loss", [v[0] for v in FLAT.values()], ids=list(FLAT))
def test_equal_logits_and_sure_teachers_give_finite_gradients(loss):
    flat = jnp.zeros((BATCH, CLASSES))
    sure = 1000 * jax.nn.one_hot(LABELS, CLASSES)
    for student, teacher in ((flat, flat), (flat, sure), (sure, flat)):
        assert np.all(np.isfinite(jax.grad(loss)(student, teacher)))


def softmax(row):
    powers = [np.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


def test_standardised_by_hand():
    """(1, 2, 4, 5) has mean 3 and sum of squares 10; of 4 values, by 3."""
    got = kd.standardised(jnp.array([[1.0, 2.0, 4.0, 5.0]]))
    wanted = np.array([[-2.0, -1.0, 1.0, 2.0]]) / (np.sqrt(10 / 3) + 1e-7)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_standardised_has_the_small_number_beside_the_deviation():
    """Of deviation 1e-7 half of the z-score is left; equal logits give zeros."""
    tiny = 1e-7 / np.sqrt(2)
    got = kd.standardised(jnp.array([[-tiny, tiny], [7.0, 7.0]]))
    half = np.sqrt(0.5) / 2
    np.testing.assert_allclose(got, [[-half, half], [0, 0]], rtol=1e-5)


def test_dist_by_hand():
    p = [softmax(row / 4) for row in STUDENT]
    q = [softmax(row / 4) for row in TEACHER]
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = zip(np.transpose(p), np.transpose(q), strict=True)
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in columns])
    got = dist.dist_loss(STUDENT, TEACHER, 2.0, 3.0, 4.0)
    np.testing.assert_allclose(got, 16 * (2 * inter + 3 * intra), rtol=1e-4)


def test_dist_sees_no_shift_and_no_scale_of_probabilities():
    """Two classes: any two students that prefer the same one correlate fully."""
    teacher = jnp.array([[0.0, 1.0], [2.0, 0.0]])
    got = dist.dist_loss(3 * teacher, teacher, 1.0, 0.0, 1.0)
    np.testing.assert_allclose(got, 0, atol=1e-6)


def test_nkd_by_hand():
    wanted = 0.0
    for s, t, label in zip(STUDENT, TEACHER, LABELS.tolist(), strict=True):
        wanted -= softmax(t)[label] * np.log(softmax(s)[label])
        p, q = (softmax(np.delete(x, label) / 2) for x in (s, t))
        wanted -= 1.5 * 4 * sum(b * np.log(a) for a, b in zip(p, q, strict=True))
    np.testing.assert_allclose(_nkd(STUDENT, TEACHER), wanted / BATCH, rtol=1e-5)


def test_nkd_least_of_the_others_is_the_teacher():
    """Without the label's logit the gradient vanishes where student is teacher."""
    grad = np.array(jax.grad(_nkd)(jnp.asarray(TEACHER), TEACHER))
    p = np.asarray(jax.nn.softmax(TEACHER))
    target = np.eye(CLASSES)[np.asarray(LABELS)]
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
    np.testing.assert_allclose(loss(STUDENT, TEACHER, 0.25), total / BATCH, rtol=1e-5)


def test_ttm_of_exponent_one_is_kd():
    got = wttm.ttm_loss(STUDENT, TEACHER, 1.0)
    np.testing.assert_allclose(got, kd.kd_loss(STUDENT, TEACHER, 1.0), rtol=1e-5)
    weighted = wttm.wttm_loss(STUDENT, TEACHER, 1.0)  # probabilities sum to one
    np.testing.assert_allclose(weighted, got, rtol=1e-5)


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
    got = mlkd.mlkd_loss(STUDENT, TEACHER, (2.0,), 0.5, 0.25, standardise=False)
    np.testing.assert_allclose(got, examples + batch / 2 + classes / 4, rtol=1e-5)


def test_ctkd_climbs_with_the_temperature():
    """The public code's gradient of the parameter at lambda = 0.3, and at 0."""
    slope = jax.grad(_ctkd, argnums=2)
    np.testing.assert_allclose(slope(STUDENT, TEACHER, 1.0), 0.0368295, rtol=1e-4)
    assert slope(STUDENT, TEACHER, 1.0, 0.0) == 0
    step = 1e-2
    high, low = (_ctkd(STUDENT, TEACHER, 1.0 + s) for s in (step, -step))
    true = float(high - low) / (2 * step)
    got = slope(STUDENT, TEACHER, 1.0, 1.0)
    np.testing.assert_allclose(got, -true, rtol=1e-2)


def test_ctkd_is_kd_at_its_temperature():
    got = _ctkd(STUDENT, TEACHER, raw=0.0)
    np.testing.assert_allclose(got, kd.kd_loss(STUDENT, TEACHER, 11.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("epoch", "wanted"),
    [(0.0, 0.02447174), (3.9, 0.3454915), (9.0, 1.0), (14.5, 1.0)],
)
def test_ctkd_reversal_is_the_public_schedule(epoch, wanted):
    """The public code's values in epochs 1, 4, 10 and 15, counted from 1."""
    got = ctkd.reversal(jnp.float32(epoch), 0.0, 1.0, 10.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_sdd_cells_are_in_order_of_their_scales():
    logits = jnp.arange(16.0).reshape(1, 4, 4, 1)
    got = sdd.cells(logits, (1, 2))[0, :, 0]
    np.testing.assert_allclose(got, [7.5, 2.5, 4.5, 10.5, 12.5])


def test_sdd_weighs_parts_about_which_the_teacher_changes_its_mind():
    """Two images, right and wrong as a whole, with one part each way."""
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    whole = jnp.array([right, wrong])
    teacher = jnp.array([[right, wrong], [right, wrong]])
    student, labels = jnp.zeros((2, 2, 2)), jnp.array([0, 0])
    one = kd.kd_loss(student[0, :1], teacher[0, :1], 1.0)

    def base(s, t, _):
        return kd.kd_loss(s, t, 1.0)

    got = sdd.sdd_loss(student, teacher, whole, labels, 5.0, base)
    np.testing.assert_allclose(got, one * (1 + 5 + 5 + 1) / 4, rtol=1e-6)


def test_sdd_logits_of_positions_average_to_those_of_parts():
    """For a linear head; one with a ReLU before its pooling is not mixed up."""
    rng = np.random.default_rng(2)
    features = jnp.asarray(rng.standard_normal((3, 4, 4, 5)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((5, CLASSES)), jnp.float32)

    def linear(x):
        return jnp.mean(x, (1, 2)) @ weights

    def rectified(x):
        return jnp.mean(jax.nn.relu(x), (1, 2)) @ weights

    corner = features[:, :2, 2:]
    for head in (linear, rectified):
        parts = sdd.cells(relation.logit_map(head, features), (1, 2))
        np.testing.assert_allclose(parts[:, 0], head(features), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(parts[:, 2], head(corner), rtol=1e-4, atol=1e-5)


def outputs(logits):
    return chain.Outputs(logits, None, (), (), (), jnp.zeros((len(logits), 1)))


def signals(**fields):
    return method.Signals(
        student=outputs(jnp.asarray(STUDENT)),
        teacher=outputs(jnp.asarray(TEACHER)),
        labels=LABELS,
        epoch=jnp.float32(3),
        student_joints=(jnp.asarray(STUDENT_MAP),),
        teacher_joints=(jnp.asarray(TEACHER_MAP),),
        **fields,
    )


SHARED = {"ce_weight": 0.0, "weight": 2.0, "warmup_epochs": 0.0}
TTM = {"exponent": 0.1}
METHODS = {
    "dist": {"beta": 2.0, "gamma": 0.5, "temperature": 4.0},
    "nkd": {"gamma": 1.5, "temperature": 2.0},
    "ttm": TTM,
    "wttm": TTM,
    "mlkd": {"temperatures": (2.0, 3.0), "batch_weight": 0.5, "class_weight": 0.25},
    "ctkd": {
        "temperature_min": 1.0,
        "temperature_span": 20.0,
        "lambda_min": 0.0,
        "lambda_max": 1.0,
        "lambda_epochs": 10.0,
    },
}


def raw_loss(name, student, teacher, standardise):
    if standardise and name != "mlkd":
        student, teacher = kd.standardised(student), kd.standardised(teacher)
    own = METHODS[name]
    match name:
        case "dist":
            return dist.dist_loss(student, teacher, **own)
        case "nkd":
            return nkd.nkd_loss(student, teacher, LABELS, **own)
        case "mlkd":
            return mlkd.mlkd_loss(student, teacher, **own, standardise=standardise)
        case "ctkd":
            return _ctkd(student, teacher)
    loss = {"ttm": wttm.ttm_loss, "wttm": wttm.wttm_loss}[name]
    return loss(student, teacher, **own)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_methods_weigh_their_loss_and_standardise(name, standardise):
    made = distill.create(name, SHARED | METHODS[name] | {"standardise": standardise})
    (loss,), _ = made.init_with_output(jax.random.key(0), signals(), train=True)
    wanted = raw_loss(name, jnp.asarray(STUDENT), jnp.asarray(TEACHER), standardise)
    np.testing.assert_allclose(loss.terms[name], wanted, rtol=1e-5)
    np.testing.assert_allclose(loss.total(), 2 * wanted, rtol=1e-5)


def test_ctkd_trains_its_temperature_upwards_in_loss():
    """One step of descent on what the method gives raises KD's divergence."""
    made = distill.create("ctkd", SHARED | METHODS["ctkd"] | {"standardise": False})
    variables = made.init(jax.random.key(0), signals(), train=True)
    assert list(variables["params"]) == ["head"]

    def total(params):
        return method.total(made.apply({"params": params}, signals(), train=True))

    before, grad = jax.value_and_grad(total)(variables["params"])
    after = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grad)
    assert total(after) > before


@pytest.mark.parametrize("base", sdd.BASES)
@pytest.mark.parametrize("standardise", [False, True])
def test_sdd_reads_both_heads(base, standardise):
    options = {
        "base": base,
        "scales": (1, 2),
        "complementary": 2.0,
        "temperature": 2.0 if base == "nkd" else 4.0,
        "alpha": 1.0,
        "beta": 8.0,
        "gamma": 1.5,
        "standardise": standardise,
    }
    made = distill.create("sdd", SHARED | options)
    heads = {
        "student_head": lambda x: 2 * jnp.mean(x, (1, 2)),
        "teacher_head": lambda x: jnp.mean(x, (1, 2)),
    }
    (loss,) = made.apply({}, signals(**heads), train=True)
    ours, theirs = sdd.cells(2 * STUDENT_MAP, (1, 2)), sdd.cells(TEACHER_MAP, (1, 2))
    if standardise:
        ours, theirs = kd.standardised(ours), kd.standardised(theirs)
    wanted = sdd.sdd_loss(ours, theirs, TEACHER, LABELS, 2.0, BASES[base])
    np.testing.assert_allclose(loss.terms["sdd"], wanted, rtol=1e-5)
