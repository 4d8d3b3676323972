"""Shows which classes a student confuses, with images."""

from pathlib import Path

import numpy as np

from lakd_jax.explain import subject
from lakd_jax.report import canvas, evaluation, page

_PAIRS, _IMAGES = 5, 6  # pairs of classes; images of each
_SIDE, _TITLE = 120, 26  # pixels


def section(s: subject.Subject, scratch: Path) -> list[str]:
    """Returns the part of the report: scores, the most confused pairs, their images."""
    dataset = s.environment.dataset.preview
    test, names = dataset.test, dataset.classes
    logits, _ = subject.observe(
        s.student.model, s.student.variables, s.pixels, test.images, ()
    )
    matrix = evaluation.confusion(logits, test.labels)
    pairs = evaluation.confused(matrix)[:_PAIRS]
    parts = [page.table(["score", "test split"], _scores(s))]
    if not pairs:
        return [*parts, page.text(f"All of {len(test)} test images are right.")]
    rows = [
        [names[true], names[answer], str(count), f"{count / matrix[true].sum():.1%}"]
        for true, answer, count in pairs
    ]
    answers, lines = logits.argmax(-1), []
    for true, answer, _ in pairs:
        found = np.flatnonzero((test.labels == true) & (answers == answer))
        title = f"{names[true]}, taken for {names[answer]}"
        lines.append((title, test.images[found[:_IMAGES]]))
    path = scratch / "errors_made.png"
    _draw(path, lines)
    header = ["true class", "answer", "images", "share of the class"]
    words = (
        f"The most frequent errors among {len(test):,} test images; "
        "`python main.py --mode=evaluate` writes all of them."
    )
    picture = page.picture(path, "Test images that the student classifies wrongly.")
    return [*parts, page.table(header, rows), page.text(words), picture]


def _scores(s: subject.Subject) -> list[list[str]]:
    last = s.result["test_last"]
    shown = {
        "accuracy": "accuracy",
        "top5": "accuracy of the five likeliest",
        "mean_over_classes": "mean over classes",
        "agreement": "agrees with the teacher",
    }
    rows = [
        [name, f"{100 * last[key]:.2f} %"]
        for key, name in shown.items()
        if last[key] is not None
    ]
    return [*rows, ["calibration error (ECE)", f"{last['calibration_error']:.3f}"]]


@canvas.any_script()
def _draw(path: Path, lines: list[tuple[str, np.ndarray]]) -> None:
    """Draws a row of images under each title."""
    height = _SIDE + _TITLE
    figure = canvas.new_figure(_IMAGES * _SIDE, len(lines) * height)
    for row, (title, images) in enumerate(lines):
        top = 1 - row / len(lines)
        style = {"fontsize": 8, "color": canvas.INK, "parse_math": False}
        figure.text(0.01, top - 6 / (len(lines) * height), title, va="top", **style)
        for column, image in enumerate(images):
            left, bottom = column / _IMAGES, top - 1 / len(lines)
            box = (left, bottom, 0.96 / _IMAGES, 0.96 * _SIDE / height / len(lines))
            axis = figure.add_axes(box)
            axis.imshow(image)
            axis.axis("off")
    canvas.save(figure, path)
