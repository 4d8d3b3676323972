"""Computes the numbers of a report, per module and over training."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lakd_jax.explain import conflict, similarity, subject
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.report import metrics
from lakd_jax.runs import pictures
from lakd_jax.store import workdir

PyTree = Any

IMAGES = 500  # test images for CKA
PROBE_TRAIN, PROBE_TEST = 1500, 1000
CONFLICT_CLASSES, CONFLICT_IMAGES = 10, 20  # classes compared; images per class


@dataclasses.dataclass(frozen=True)
class Module:
    """Scores of one module at one step, in [0, 1]; None if there is no teacher."""

    name: str
    joint: str
    cka: float | None
    probe: float
    teacher_probe: float | None


@dataclasses.dataclass(frozen=True)
class Moment:
    """Scores of the student after `step` steps, per module."""

    step: int
    epoch: float
    modules: list[Module]


def over_training(s: subject.Subject, notify: Callable[[str], None]) -> list[Moment]:
    """Returns scores for every remaining checkpoint and for the final student."""
    past, total = list(subject.past(s)), s.steps_per_epoch * s.config.epochs
    if not past or past[-1][0] < total:
        past.append((total, s.student.variables))
    parts, teacher = _partition(s), None
    if s.teacher and s.teacher.network.model.stage_sizes:
        network, pixels = s.teacher.network, s.teacher.pixels
        teacher = _measure(
            s, network.model, network.variables, pixels, parts.teacher_joints
        )
    moments = []
    for step, variables in past:
        notify(f"features after step {step:,}")
        student = _measure(
            s, s.student.model, variables, s.pixels, parts.student_joints
        )
        modules = _modules(parts, student, teacher)
        moments.append(Moment(step, step / s.steps_per_epoch, modules))
    return moments


@dataclasses.dataclass(frozen=True)
class _Side:
    """Features of one network on test images at its joints, and their probes."""

    test: list[np.ndarray]
    probes: list[float]


def _measure(
    s: subject.Subject,
    model: chain.Chain,
    variables: PyTree,
    pixels: Any,
    joints: tuple[str, ...],
) -> _Side:
    (train, train_labels), (test, test_labels) = _probe_images(s)
    pooled = []
    for images in (train, test):
        _, features = subject.observe(model, variables, pixels, images, joints)
        pooled.append([f.astype(np.float32).mean((1, 2)) for f in features])
    probes = [
        similarity.probe_accuracy(a, train_labels, b, test_labels)
        for a, b in zip(*pooled, strict=True)
    ]
    return _Side([f[:IMAGES].astype(np.float32) for f in features], probes)


def _modules(
    parts: cuts.Partition, student: _Side, teacher: _Side | None
) -> list[Module]:
    out = []
    for k, (name, joint) in enumerate(
        zip(parts.names, parts.student_joints, strict=True)
    ):
        cka, teacher_probe = None, None
        if teacher:
            cka = similarity.linear_cka(student.test[k], teacher.test[k])
            teacher_probe = teacher.probes[k]
        out.append(Module(name, joint, cka, student.probes[k], teacher_probe))
    return out


def _partition(s: subject.Subject) -> cuts.Partition:
    teacher = s.teacher.network.model if s.teacher else s.student.model
    return pictures.partition(s.config, s.student.model, teacher)


def _probe_images(s: subject.Subject) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns fixed (images, labels) for training and for testing the probes."""
    preview, out = s.environment.dataset.preview, []
    for split, count in ((preview.train, PROBE_TRAIN), (preview.test, PROBE_TEST)):
        chosen = np.random.default_rng(0).permutation(len(split))[:count]
        out.append((split.images[chosen], split.labels[chosen]))
    return out


def right_and_wrong(s: subject.Subject, count: int) -> np.ndarray:
    """Returns up to `count` correctly and up to `count` wrongly classified images.

    Images are taken in a fixed random order, at most one per class as long as there
    are other classes.

    Returns:
        Positions in the test split, the correct ones first.
    """
    test = s.environment.dataset.preview.test
    order = np.random.default_rng(0).permutation(len(test))[:2000]
    logits, _ = subject.observe(
        s.student.model, s.student.variables, s.pixels, test.images[order], ()
    )
    right = logits.argmax(-1) == test.labels[order]
    chosen = [
        _spread(order[right == kind], test.labels, count) for kind in (True, False)
    ]
    return np.concatenate(chosen)


def _spread(places: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Selects up to `count` of `places`, from as many classes as possible."""
    seen: collections.Counter[int] = collections.Counter()
    rank = []
    for label in labels[places].tolist():
        seen[label] += 1
        rank.append(seen[label])
    return places[np.argsort(rank, kind="stable")[:count]]


def feature_errors(s: subject.Subject) -> dict[str, list[tuple[float, float]]]:
    """Returns module -> [(epoch, relative feature error)] as logged in training.

    Empty for methods that do not compare features.
    """
    out: dict[str, list[tuple[float, float]]] = {}
    for record in metrics.read(s.directory):
        for name, value in record.items():
            if record["kind"] == "train" and name.endswith("/feature_error"):
                point = (record["step"] / s.steps_per_epoch, value)
                out.setdefault(name.split("/")[0], []).append(point)
    return out


def conflicts(s: subject.Subject) -> dict[str, dict[str, float]]:
    """Returns method -> part of the network -> mean cosine of class gradients.

    Covers the run and its baselines, on the same training images.
    """
    split = s.environment.dataset.preview.train
    generator = np.random.default_rng(0)
    classes = np.unique(split.labels)
    classes = np.sort(generator.permutation(classes)[:CONFLICT_CLASSES])
    chosen = np.concatenate(
        [np.flatnonzero(split.labels == c)[:CONFLICT_IMAGES] for c in classes]
    )
    images = np.asarray(s.pixels(jnp.asarray(split.images[chosen])))
    students = {s.config.method: s.student}
    for method in s.config.baselines:
        path = s.directory / method / workdir.STUDENT
        if path.exists():
            students[method], _ = weights.student(path, s.config.dtype)
    return {
        method: conflict.mean_cosines(
            student.model, student.variables, images, split.labels[chosen], classes
        )
        for method, student in students.items()
    }
