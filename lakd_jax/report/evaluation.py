"""Computes what a classifier's answers on a labelled split say, and writes them."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

_BINS = 15  # of the calibration error
_CONFUSED = 10  # pairs of classes that are listed
_LISTED = 5  # classes per line of predictions.csv


def summary(
    logits: np.ndarray, labels: np.ndarray, teacher: np.ndarray | None = None
) -> dict[str, float | None]:
    """Returns the scores of a result, each in 0..1.

    Args:
      logits: (N, K) float32.
      labels: (N,) integers.
      teacher: (N,) classes that the teacher answers on the same images.

    Returns:
      `top5` (None with five classes or fewer), `mean_over_classes` (the mean recall of
      the classes that occur), `calibration_error` (see `calibration_error`) and
      `agreement` with the teacher's answers (None without one).
    """
    recalls = [row["recall"] for row in per_class(confusion(logits, labels))]
    known = [recall for recall in recalls if recall is not None]
    return {
        "top5": top_accuracy(logits, labels, 5) if logits.shape[1] > 5 else None,
        "mean_over_classes": float(np.mean(known)),
        "calibration_error": calibration_error(logits, labels),
        "agreement": None
        if teacher is None
        else float(np.mean(logits.argmax(-1) == teacher)),
    }


def top_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the share of examples whose label is among the `k` largest logits."""
    of_label = np.take_along_axis(logits, labels[:, None].astype(np.int64), 1)
    # Written so that an answer of NaN is not right.
    return float(np.mean((~(logits <= of_label)).sum(-1) < k))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax of (N, K) logits in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the expected calibration error over 15 equal bins of the confidence.

    Source: Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599),
    equation 3: the mean distance of confidence and accuracy in a bin, weighted by the
    number of its examples.
    """
    shifted = logits - logits.max(-1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(-1, dtype=np.float64)
    right = logits.argmax(-1) == labels
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, confidence - right, _BINS)
    return float(np.abs(gaps).sum() / len(labels))


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns (K, K) counts: rows are the true classes, columns the answers."""
    classes = logits.shape[1]
    pairs = labels.astype(np.int64) * classes + logits.argmax(-1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def per_class(matrix: np.ndarray) -> list[dict[str, Any]]:
    """Returns examples, recall and precision of each class of a confusion matrix.

    Recall is None for a class without examples, precision for one never answered.
    """
    right, examples, answers = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    return [
        {
            "examples": int(n),
            "recall": float(r / n) if n else None,
            "precision": float(r / a) if a else None,
        }
        for r, n, a in zip(right, examples, answers, strict=True)
    ]


def confused(matrix: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns the most frequent errors as (true class, answer, how often)."""
    errors = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-errors, axis=None, kind="stable")[:_CONFUSED]
    pairs = (np.unravel_index(place, errors.shape) for place in order)
    return [(int(t), int(a), int(errors[t, a])) for t, a in pairs if errors[t, a]]


def confused_names(matrix: np.ndarray, classes: Sequence[str]) -> list[list[Any]]:
    """Returns `confused` with the names of the classes."""
    return [[classes[t], classes[a], count] for t, a, count in confused(matrix)]


def predictions(
    files: Sequence[str],
    logits: np.ndarray,
    classes: Sequence[str],
    labels: np.ndarray | None = None,
) -> bytes:
    """Returns a CSV table: file, true, predicted, probability, and the five likeliest.

    Args:
      files: names of the N images.
      logits: (N, K).
      classes: K names.
      labels: (N,) integers; None leaves "true" empty.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "true", "predicted", "probability", "top5"])
    for i, (file, row) in enumerate(zip(files, probabilities(logits), strict=True)):
        order = np.argsort(-row, kind="stable")[:_LISTED]
        likeliest = "; ".join(f"{classes[k]} {row[k]:.4f}" for k in order)
        true = "" if labels is None else classes[labels[i]]
        best = order[0]
        writer.writerow([file, true, classes[best], f"{row[best]:.6f}", likeliest])
    return text.getvalue().encode()
