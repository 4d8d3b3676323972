"""Losses of two networks' logits or features, and what is known of each.

Arrays of gradients come from the golden files, computed with mdistiller's and
RepDistiller's loss files in PyTorch. Numbers were computed with the public code of each
method on the inputs here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import toys

from lakd_jax import distill

partial = functools.partial

INPUTS = golden_weights.arrays("losses_inputs")
GOLDEN = golden_weights.arrays("losses")
BATCH, CLASSES = 12, 10


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss of (student, teacher), with public values.

    Attributes:
      value: of the loss, to `rtol`.
      grads: of it to the student, one array each.
      norms: of those gradients, where they are not known themselves.
      along: (a direction, the product of the gradient with it).
      least: a student and a teacher whose loss is 0; None where no such is known.
    """

    loss: Callable[[Any, Any], jax.Array]
    student: Any
    teacher: Any
    value: float | np.ndarray
    grads: Sequence[np.ndarray] = ()
    norms: Sequence[float] = ()
    along: tuple[np.ndarray, float] | None = None
    least: Any = None
    rtol: float = 1e-4


def stages(name):
    return [INPUTS[f"feat_{name}_{i}"] for i in range(3)]


def _golden(name, loss, student, teacher):
    keys = [key for key in GOLDEN if key.startswith(f"{name}/grad_s")]
    grads = [GOLDEN[key] for key in keys]
    least = (student, student)
    if name == "ofd_feat_loss":  # the student has to reach the margin
        least = np.maximum(teacher, MARGIN), teacher
    elif name.endswith(("wide", "small")):
        least = None
    return Case(loss, student, teacher, GOLDEN[name], grads=grads, least=least)


def _drawn_inputs():
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


STUDENT, TEACHER, LABELS, WAY, STUDENT_MAP, TEACHER_MAP, MAP_WAY = _drawn_inputs()


def softmax(row):
    powers = [np.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


# Golden arrays


def _dkd(student, teacher, beta, temperature):
    labels = jnp.asarray(INPUTS["labels"])
    return distill.dkd.dkd_loss(student, teacher, labels, 1.0, beta, temperature)


MARGIN = INPUTS["ofd_margin"][:, 0, 0]


def _margin(student, teacher):
    return distill.ofd.margin_loss(student, teacher, MARGIN)


def _golden_cases():
    """By golden name."""
    logits = INPUTS["logits_student"], INPUTS["logits_teacher"]
    pooled = INPUTS["pooled_student"], INPUTS["pooled_teacher"]
    same = INPUTS["pooled_student"], INPUTS["pooled_teacher_same"]
    last = INPUTS["feat_student_2"], INPUTS["feat_teacher_2"]
    maps = stages("student"), stages("teacher")
    preacts = INPUTS["ofd_student_connected"], INPUTS["ofd_teacher_preact"]
    at_loss = partial(distill.at.at_loss, p=2)
    rkd_loss = partial(distill.rkd.rkd_loss, distance_weight=25.0, angle_weight=50.0)
    cases = {
        "kd_t1": (partial(distill.kd.kd_loss, temperature=1.0), logits),
        "kd_t4": (partial(distill.kd.kd_loss, temperature=4.0), logits),
        "dkd_a1_b8_t4": (partial(_dkd, beta=8.0, temperature=4.0), logits),
        "dkd_a1_b2_t1": (partial(_dkd, beta=2.0, temperature=1.0), logits),
        "rkd_d25_a50": (rkd_loss, pooled),
        "pkt": (distill.pkt.pkt_loss, pooled),
        "cc": (distill.cc.cc_loss, same),
        "hcl": (distill.review.hcl_loss, maps),
        "fsp_sum": (distill.fsp.fsp_loss, maps),
        "ft_factor": (distill.ft.factor_loss, last),
        "ofd_feat_loss": (_margin, preacts),
    }
    for kind in ("teacher", "teacher_wide", "teacher_small"):
        both = stages("student"), stages(kind)
        cases[f"at_p2/feat_{kind}"] = at_loss, both
        cases[f"nst/feat_{kind}"] = distill.nst.nst_loss, both
        cases[f"sp/feat_{kind}"] = distill.sp.sp_loss, (both[0][-1], both[1][-1])
    return {name: _golden(name, loss, *both) for name, (loss, both) in cases.items()}


# Logits


def _kd_standardised(student, teacher):
    return distill.kd.kd_loss(*map(distill.kd.standardised, (student, teacher)), 2.0)


def _nkd(student, teacher):
    return distill.nkd.nkd_loss(student, teacher, LABELS, gamma=1.5, temperature=2.0)


def reversed_ctkd(student, teacher, raw=1.0, reversal=0.3):
    return distill.ctkd.ctkd_loss(
        student, teacher, jnp.float32(raw), reversal, 1.0, 20.0
    )


BASES = {
    "kd": lambda student, teacher, _: distill.kd.kd_loss(student, teacher, 4.0),
    "dkd": partial(distill.dkd.dkd_loss, alpha=1.0, beta=8.0, temperature=4.0),
    "nkd": partial(distill.nkd.nkd_loss, gamma=1.5, temperature=2.0),
}


def _sdd(student, teacher, base, scales):
    whole = jnp.mean(teacher, (1, 2))
    ours, theirs = (distill.sdd.cells(x, scales) for x in (student, teacher))
    return distill.sdd.sdd_loss(ours, theirs, whole, LABELS, 2.0, BASES[base])


def _mlkd(standardise):
    return partial(
        distill.mlkd.mlkd_loss,
        temperatures=(2.0, 3.0, 4.0),
        batch_weight=1.0,
        class_weight=1.0,
        standardise=standardise,
    )


def _softened(exponent):
    """The student that the transformed teacher is, and that teacher."""
    student = exponent * np.log([softmax(row) for row in TEACHER])
    return student.astype(np.float32), TEACHER


# The loss of (student, teacher); its value, and of its gradient |g| and <g, way>.
FLAT = {
    "ttm": (
        partial(distill.wttm.ttm_loss, exponent=0.1),
        (2.442241, 0.17697, 0.0492715),
    ),
    "wttm": (
        partial(distill.wttm.wttm_loss, exponent=0.2),
        (9.101264, 0.690459, 0.314296),
    ),
    "dist_t4": (
        partial(distill.dist.dist_loss, beta=2.0, gamma=0.5, temperature=4.0),
        (42.60561, 1.34083, 1.4565),
    ),
    "dist_t1": (
        partial(distill.dist.dist_loss, beta=1.0, gamma=2.0, temperature=1.0),
        (3.202516, 0.136602, 0.182592),
    ),
    "nkd": (_nkd, (21.03725, 0.608093, 0.335692)),
    "mlkd": (_mlkd(False), (30.73525, 1.39056, 1.31788)),
    "mlkd_standardised": (_mlkd(True), (4.03967, 0.127431, 0.09457)),
    "kd_standardised": (_kd_standardised, (0.9901001, 0.0345751, 0.0334543)),
    "ctkd": (reversed_ctkd, (10.64532, 0.428619, 0.285199)),
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


def _logit_cases():
    def case(loss, student, teacher, way, known, least):
        value, norm, along = known
        more = {"norms": [norm], "along": (way, along), "least": least, "rtol": 1e-5}
        return Case(loss, student, teacher, value, **more)

    least = {"ttm": _softened(0.1), "wttm": _softened(0.2), "nkd": None}
    flat = STUDENT, TEACHER, WAY
    cases = {
        name: case(loss, *flat, known, least.get(name, (TEACHER, TEACHER)))
        for name, (loss, known) in FLAT.items()
    }
    maps = STUDENT_MAP, TEACHER_MAP, MAP_WAY
    for (base, scales), known in PARTS.items():
        loss = partial(_sdd, base=base, scales=scales)
        equal = None if base == "nkd" else (TEACHER_MAP, TEACHER_MAP)
        cases[f"sdd_{base}_{scales[-1]}"] = case(loss, *maps, known, equal)
    return cases


# Others

noise = toys.noise
CHANNELS = [
    [noise(5, 4, 6, 6, 3), noise(6, 4, 3, 3, 5)],
    [noise(7, 4, 6, 6, 3), noise(8, 4, 4, 4, 5)],
]
GUIDED = noise(9, 6, 4), noise(10, 6, 4)
GUIDED_LABELS = np.array([3, 3, 0, 3, 0, 1])  # the teacher gets the first three
ND = np.float32(1.1) * noise(2, 6, 8), noise(3, 6, 8)
ND_LABELS = np.arange(6) % 3
ND_CENTRES = noise(4, 3, 8)[ND_LABELS]
CAMS = noise(0, 4, 5, 5, 3), noise(1, 4, 6, 6, 3)
# (normalise, binarise) -> value and the gradient's norm.
CATKD = {
    (False, False): (0.24462813, 0.050697494),
    (False, True): (0.15852170, 0.044784971),
    (True, False): (0.56696242, 0.10465724),
    (True, True): (0.52116007, 0.11837061),
}


def cam_loss(student, teacher, normalise=False, binarise=False):
    return distill.catkd.cam_loss(
        student, teacher, 2, normalise=normalise, binarise=binarise
    )


def guided_kd(temperature):
    return partial(
        distill.cd.guided_kd_loss, labels=GUIDED_LABELS, temperature=temperature
    )


def nd_loss(student, teacher):
    return distill.kdpp.nd_loss(student, teacher, ND_CENTRES)


def _other_cases():
    moved = [np.roll(x, 1, axis=2) for x in CHANNELS[1]]
    known = {"norms": [0.016110135, 0.050133307], "least": (moved, CHANNELS[1])}
    cases = {
        "cd": Case(distill.cd.channel_loss, *CHANNELS, 0.14113063, **known),
        "kdpp": Case(nd_loss, *ND, 1.0359124, norms=[0.12687117]),
    }
    for temperature, value, norm in (
        (1.0, 0.45324183, 0.29519784),
        (3.0, 0.49931243, 0.30372944),
    ):
        loss = guided_kd(temperature)
        least = GUIDED[1], GUIDED[1]
        case = Case(loss, *GUIDED, value, norms=[norm], least=least)
        cases[f"cd_guided_t{temperature:g}"] = case
    for (normalise, binarise), (value, norm) in CATKD.items():
        loss = partial(cam_loss, normalise=normalise, binarise=binarise)
        name = "catkd" + "_normalise" * normalise + "_binarise" * binarise
        least = None if binarise else (CAMS[1], CAMS[1])
        cases[name] = Case(loss, *CAMS, value, norms=[norm], least=least)
    return cases


CASES = {**_golden_cases(), **_logit_cases(), **_other_cases()}
