"""Explains a finished run: `run(directory)` writes report.html into it."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lakd_jax import errors, fields, paths
from lakd_jax.explain import (
    contribution,
    errors_made,
    learnt,
    measure,
    subject,
    taps,
)
from lakd_jax.hme import network, report
from lakd_jax.models import projector
from lakd_jax.report import page, pictures
from lakd_jax.runs import pictures as pictures_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import bucket, workdir

REPORT = "report.html"
_SHOWN = 5  # test images that the student classifies correctly, and as many wrongly


def run(
    directory: str | Path,
    *,
    points: str = "",
    masks: str | Path = "",
    guard: interrupt.Guard,
    notify: Callable[[str], None] = print,
) -> Path:
    """Analyses the networks of a finished run and writes a report.

    Args:
        directory: directory of the run, or of one of its baselines.
        points: "short" or "official" adds what was learnt in knowledge points, see
            `learnt.EXTENTS`; this takes longer than all the rest.
        masks: a folder with the foreground of test images for them, see
            `regions.of_masks`.
        guard: stops the analysis on a signal.
        notify: receives progress lines for the user.

    Returns:
        The path of the page, a single file that loads nothing from the network.

    Raises:
        errors.ConfigError: `directory` is neither a local path nor in a bucket, or
            `points` is unknown.
        errors.ExportError: there is no finished run.
        errors.LakdError: the run's images or teacher are no longer available.
    """
    _require_known(points, masks)
    s = subject.load(paths.place(directory, "--workdir"), guard, notify)
    with tempfile.TemporaryDirectory() as scratch:
        sections = [("The run", _summary(s))]
        for heading, make in (
            ("Where it errs", _errors_made),
            ("Where the networks look", _attention),
            ("What each module has learnt", _modules),
            ("What modules and masks contribute", contribution.section),
            ("How much was learnt", functools.partial(_learnt, points, masks)),
            ("Feature error in training", _feature_errors),
            ("Which taps attend to which", _taps),
            ("Experts and tasks", _experts),
            ("Knowledge conflict", _conflict),
        ):
            guard.check()
            parts = make(s, Path(scratch), notify)
            sections += [(heading, parts)] if parts else []
    path = s.directory / REPORT
    title = f"{s.config.student.name}, {s.config.method}: what it learnt"
    workdir.write_bytes(path, page.render(title, sections).encode())
    notify(f"{path} ({bucket.size(path):,} bytes)")
    return path


def _require_known(points: str, masks: str | Path) -> None:
    """Raises ConfigError for flags of knowledge points that mean nothing."""
    if points and (fault := fields.fault(points, learnt.EXTENTS)):
        raise errors.ConfigError([f"--points {fault}"])
    if masks and not points:
        raise errors.ConfigError(["--masks has no effect without --points; remove it"])


def _summary(s: subject.Subject) -> list[str]:
    last, result = s.result["test_last"], s.result
    student = f"{result['student']}, {result['parameters']:,} parameters"
    student += projector.words(s.student.model.projector)
    rows = [
        ["data", f"{s.environment.dataset.preview.name}, {result['classes']} classes"],
        ["student", student],
        ["method", result["method"]],
        ["epochs, seed", f"{result['epochs']}, {result['seed']}"],
        ["right on the test split", f"{last['right']} of {last['examples']}"],
        ["accuracy, last epoch", _percent(last["accuracy"])],
    ]
    if s.teacher:
        score = s.teacher.score
        accuracy = _percent(score.accuracy) if score else "of other classes"
        name = f"{result['teacher']}, {accuracy}"
        rows.insert(2, ["teacher", name])
    parts = [page.table(["", ""], rows)]
    curves = s.directory / "curves.png"
    if curves.exists():
        parts.append(page.picture(curves, "Accuracy and loss over epochs."))
    return parts


def _errors_made(
    s: subject.Subject, scratch: Path, notify: Callable[[str], None]
) -> list[str]:
    notify("errors on the test split")
    return errors_made.section(s, scratch)


def _attention(
    s: subject.Subject, scratch: Path, notify: Callable[[str], None]
) -> list[str]:
    if s.teacher is None or not s.teacher.network.model.stage_sizes:
        return []
    notify("attention maps")
    path = scratch / "attention.png"
    chosen = measure.right_and_wrong(s, _SHOWN)
    pictures_lib.attention(
        path, s.config, s.environment.dataset.preview, s.student, s.teacher, chosen
    )
    words = (
        "Test images that the student classifies correctly (first) and wrongly (after "
        "them): where teacher and student respond at the end of each module, as the "
        "sum of absolute values over channels, and the teacher's mask (NDAM), which "
        "shows where LAKD gives the comparison most weight. Each map has its own "
        "scale: compare places, not magnitudes."
    )
    description = "Attention maps of teacher and student, and masks, per module."
    return [page.text(words), page.picture(path, description)]


def _modules(s: subject.Subject, _: Path, notify: Callable[[str], None]) -> list[str]:
    moments = measure.over_training(s, notify)
    header = ["after epoch", "module", "ends at", "CKA", "probe", "teacher's probe"]
    rows = [
        [
            f"{moment.epoch:g}",
            m.name,
            m.joint,
            "-" if m.cka is None else f"{m.cka:.3f}",
            _percent(m.probe),
            "-" if m.teacher_probe is None else _percent(m.teacher_probe),
        ]
        for moment in moments
        for m in moment.modules
    ]
    words = (
        "CKA: linear centred kernel alignment of student and teacher features on "
        f"{measure.IMAGES} test images, 1 where they agree up to rotation and scale. "
        "Probe: accuracy of a linear classifier on the module's features, averaged "
        f"over positions, trained on up to {measure.PROBE_TRAIN:,} training images "
        f"and tested on up to {measure.PROBE_TEST:,} test images."
    )
    past = (
        "Earlier epochs are those whose checkpoints still exist; checkpoint.keep "
        "sets how many are kept."
    )
    return [page.table(header, rows), page.text(words), page.text(past, note=True)]


def _learnt(
    points: str,
    masks: str | Path,
    s: subject.Subject,
    scratch: Path,
    notify: Callable[[str], None],
) -> list[str]:
    if not points:
        return []
    folder = paths.local(masks, "--masks") if masks else None
    return learnt.section(s, learnt.EXTENTS[points], folder, scratch, notify)


def _feature_errors(
    s: subject.Subject, scratch: Path, _: Callable[[str], None]
) -> list[str]:
    found = measure.feature_errors(s)
    if not found:
        return []
    path = scratch / "errors.png"
    pictures.lines(path, found, label="relative feature error")
    words = (
        "The squared distance between a module's adapted features and the teacher's, "
        "relative to the squared norm of the teacher's, on training batches: "
        "predicting zero would give 1."
    )
    description = "Relative feature error of each module over epochs."
    return [page.picture(path, description), page.text(words)]


def _taps(
    s: subject.Subject, scratch: Path, notify: Callable[[str], None]
) -> list[str]:
    if s.config.method not in taps.METHODS:
        return []
    notify("attention between taps")
    return taps.section(s, scratch)


def _experts(s: subject.Subject, scratch: Path, _: Callable[[str], None]) -> list[str]:
    if not isinstance(s.student.model, network.HME):
        return []
    variables: Any = s.student.variables
    dataset = s.environment.dataset.preview
    return report.section(variables["params"], dataset.classes, dataset.name, scratch)


def _conflict(s: subject.Subject, _: Path, notify: Callable[[str], None]) -> list[str]:
    notify("knowledge conflict")
    found = measure.conflicts(s)
    parts = list(next(iter(found.values())))
    rows = [[p, *(f"{values[p]:+.4f}" for values in found.values())] for p in parts]
    words = (
        "Mean cosine between the gradients of different classes' losses with respect "
        f"to the same weights, over up to {measure.CONFLICT_CLASSES} classes with "
        f"{measure.CONFLICT_IMAGES} training images each, at the end of training. "
        "Below 0, learning one class undoes another. This is our interpretation of "
        "KDExplainer's knowledge conflict; compare methods within a row."
    )
    return [page.table(["part", *found], rows), page.text(words)]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
