"""Evaluates a finished run, on its test split or on other images."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lakd_jax import config as config_lib
from lakd_jax import distill, errors, export, paths
from lakd_jax.config import check, resolved
from lakd_jax.data import layout
from lakd_jax.report import evaluation as scores
from lakd_jax.report import pictures, summary
from lakd_jax.runs import single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import bucket, workdir
from lakd_jax.training import setup

FOLDER = "evaluation"  # in the run's directory
# What may differ from the run's config: where images are, not what is done to them.
FIELDS = ("data.source", "data.data_dir", "data.workers", "data.test_share")


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Logits (N, K) of images, and their labels (N,) if they have any.

    Attributes:
      teacher: (N,) classes that the teacher answers; None without one.
    """

    source: str
    classes: Sequence[str]
    files: Sequence[str]
    logits: np.ndarray
    labels: np.ndarray | None
    teacher: np.ndarray | None = None


def run(
    directory: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    images: str | Path = "",
    guard: interrupt.Guard,
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Computes the answers of a finished run's student and what they say.

    Writes to `directory`/evaluation: evaluation.json, predictions.csv (a line per
    image) and, with labels, confusion.png.

    Args:
      directory: of the run, or of one of its baselines.
      changes: fields of `FIELDS` by name, in place of the run's own.
      images: a folder of images to answer in place of the test split. If its
        subfolders are named after classes, these are the labels.
      guard: stops the evaluation on a signal.
      notify: receives progress lines for the user.

    Returns:
      The content of evaluation.json: `accuracy`, the scores of
      `report.evaluation.summary`, `per_class`, `confused` and `confusion` (rows are the
      true classes); without labels, how often each class was answered.

    Raises:
      errors.ConfigError: a change is not allowed, or `directory` is neither a local
        path nor in a bucket.
      errors.ExportError: there is no finished run.
      errors.DataError: images are missing or cannot be decoded.
    """
    directory = paths.place(directory, "--workdir")
    if found := sorted(set(changes or {}) - set(FIELDS)):
        raise errors.ConfigError(
            [f"{field} cannot be changed in an evaluation" for field in found]
        )
    if images:
        answers = _of_folder(directory, paths.local(images, "--images"))
    else:
        answers = _of_test_split(directory, dict(changes or {}), guard, notify)
    return _written(directory / FOLDER, answers, notify)


def _of_folder(directory: Path, root: Path) -> _Answers:
    network, card, _ = export.student(directory)
    classes = card["result"]["class_names"]
    files = layout.image_files(root)
    if not files:
        raise errors.DataError(f"--images {root}: holds no images.")
    above = [file.relative_to(root).parts[0] for file in files]
    labels = None
    if set(above) <= set(classes):
        labels = np.array([classes.index(name) for name in above], np.int32)
    names = [str(file.relative_to(root)) for file in files]
    logits = export.predictor(network)(files)
    return _Answers(str(root), classes, names, logits, labels)


def _of_test_split(
    directory: Path,
    changes: dict[str, Any],
    guard: interrupt.Guard,
    notify: Callable[[str], None],
) -> _Answers:
    recorded = config_lib.from_dict(workdir.settings(directory))
    # Nothing is tracked here, where a tracker's package may be missing.
    given = config_lib.changed(recorded, {"trackers": (), **changes})
    check.require(given, jax.device_count())
    config = resolved.resolve(given)
    folder = Path() if "data.source" in changes else workdir.folder(directory)
    environment = single.environment(config, guard, notify, folder)
    student = single.load_network("student", config, environment, str(directory))
    predicted = single.evaluator(
        config, student, setup.pixels(config), environment
    ).predict(student.variables, environment.test)
    teacher = None
    if distill.facts(config.method).needs_teacher:
        teacher = _of_teacher(directory, config, environment, notify)
    dataset = environment.dataset
    names = [dataset.test.name(i) for i in range(len(predicted.labels))]
    return _Answers(
        dataset.name,
        dataset.classes,
        names,
        predicted.logits,
        predicted.labels,
        teacher,
    )


def _of_teacher(
    directory: Path,
    config: resolved.Config,
    environment: single.Environment,
    notify: Callable[[str], None],
) -> np.ndarray | None:
    """Returns the classes that the run's teacher answers; None without the teacher."""
    try:
        teacher = teacher_lib.load_recorded(directory, config, environment)
    except errors.TeacherError as error:
        notify(f"agreement with the teacher is left out: {error}")
        return None
    if teacher.network.difference:
        return None
    evaluator = single.evaluator(config, teacher.network, teacher.pixels, environment)
    predicted = evaluator.predict(teacher.network.variables, environment.test)
    return predicted.logits.argmax(-1)


def _written(
    directory: Path, answers: _Answers, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Writes the files of an evaluation, reports it, and returns its content."""
    classes, logits = answers.classes, answers.logits
    result: dict[str, Any] = {"data": answers.source, "examples": len(logits)}
    bucket.make_folder(directory)
    table = scores.predictions(answers.files, logits, classes, answers.labels)
    workdir.write_bytes(directory / "predictions.csv", table)
    if answers.labels is None:
        counts = np.bincount(logits.argmax(-1), minlength=len(classes))
        result["answers"] = dict(zip(classes, counts.tolist(), strict=True))
    else:
        matrix = scores.confusion(logits, answers.labels)
        result |= _scores(answers, matrix)
        pictures.confusion(directory / "confusion.png", matrix, classes)
    workdir.write_json(directory / "evaluation.json", result)
    notify(f"{_described(result)}\n\n{directory} has predictions.csv and the rest")
    return result


def _scores(answers: _Answers, matrix: np.ndarray) -> dict[str, Any]:
    classes, logits, labels = answers.classes, answers.logits, answers.labels
    assert labels is not None
    of_class = scores.per_class(matrix)
    return {
        "accuracy": float(np.mean(logits.argmax(-1) == labels)),
        **scores.summary(logits, labels, answers.teacher),
        "per_class": dict(zip(classes, of_class, strict=True)),
        "confused": scores.confused_names(matrix, classes),
        "confusion": matrix.tolist(),
    }


def _described(result: Mapping[str, Any]) -> str:
    """Returns the main scores as a block of text."""
    lines = {"images": f"{result['examples']:,} of {result['data']}"}
    if "accuracy" not in result:
        answered = {name: n for name, n in result["answers"].items() if n}
        few = sorted(answered.items(), key=lambda item: -item[1])[:5]
        lines["answers"] = ", ".join(f"{name} {n:,}" for name, n in few)
        return summary.describe(lines)
    shown = {
        "accuracy": "accuracy",
        "top5": "top 5",
        "mean_over_classes": "mean over classes",
        "agreement": "agrees with teacher",
    }
    for key, name in shown.items():
        if result[key] is not None:
            lines[name] = f"{100 * result[key]:.2f} %"
    lines["calibration error"] = f"{result['calibration_error']:.3f}"
    if result["confused"]:
        errors_made = [f"{t} as {a} {n}x" for t, a, n in result["confused"][:3]]
        lines["most confused"] = ", ".join(errors_made)
    return summary.describe(lines)
