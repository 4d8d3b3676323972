"""What answers on a labelled split say."""

import csv
import io

import numpy as np
import pytest

from lakd_jax.report import evaluation, pictures

# Three classes; worked by hand: answers 0 0 1 2 1 for labels 0 1 1 2 2.
LOGITS = np.log(
    np.array([[8, 1, 1], [5, 4, 1], [1, 7, 2], [1, 1, 8], [2, 5, 3]], np.float32) / 10
)
LABELS = np.array([0, 1, 1, 2, 2], np.int32)
MATRIX = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_confusion_has_true_classes_in_rows():
    assert evaluation.confusion(LOGITS, LABELS).tolist() == MATRIX


def test_recall_and_precision_per_class():
    found = evaluation.per_class(np.array([[1, 1, 0], [0, 3, 0], [0, 0, 0]]))
    assert found == [
        {"examples": 2, "recall": 0.5, "precision": 1.0},
        {"examples": 3, "recall": 1.0, "precision": 0.75},
        {"examples": 0, "recall": None, "precision": None},
    ]


def test_scores():
    found = evaluation.summary(LOGITS, LABELS, np.array([0, 0, 1, 2, 0]))
    assert found["top5"] is None and found["agreement"] == 0.8
    assert found["mean_over_classes"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    # Bins of a fifteenth: 0.5 twice (both wrong), 0.7 and 0.8 twice (right).
    gaps = (2 * 0.5, 1 - 0.7, 2 * (1 - 0.8))
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 5)
    assert evaluation.summary(LOGITS, LABELS)["agreement"] is None


def test_classes_that_do_not_occur_do_not_count():
    assert evaluation.summary(LOGITS[:3], LABELS[:3])["mean_over_classes"] == 0.75


def test_top_k_counts_labels_among_the_largest():
    assert evaluation.top_accuracy(LOGITS, LABELS, 1) == 0.6
    assert evaluation.top_accuracy(LOGITS, LABELS, 2) == 1.0
    assert evaluation.top_accuracy(np.full((2, 3), np.nan), LABELS[:2], 1) == 0.0
    many = np.eye(6, dtype=np.float32)
    assert evaluation.summary(many, np.arange(6))["top5"] == 1.0


def test_confused_pairs_come_by_frequency():
    matrix = np.array([[9, 2, 0], [5, 1, 0], [0, 0, 7]])
    assert evaluation.confused(matrix) == [(1, 0, 5), (0, 1, 2)]


def test_predictions_are_a_table_of_files():
    table = evaluation.predictions(["a,b.png", "c.png"], LOGITS[:2], "xyz", LABELS[:2])
    rows = list(csv.DictReader(io.StringIO(table.decode())))
    assert [row["file"] for row in rows] == ["a,b.png", "c.png"]
    assert [row["true"] for row in rows] == ["x", "y"]
    assert [row["predicted"] for row in rows] == ["x", "x"]
    assert rows[1]["probability"] == "0.500000"
    assert rows[1]["top5"] == "x 0.5000; y 0.4000; z 0.1000"
    unlabelled = evaluation.predictions(["a"], LOGITS[:1], "xyz")
    assert next(csv.DictReader(io.StringIO(unlabelled.decode())))["true"] == ""


def test_the_picture_shows_the_classes_with_most_errors(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "lakd_jax.report.grids.matrices", lambda path, panels, **k: drawn.update(k)
    )
    monkeypatch.setattr("lakd_jax.report.grids._DRAWN", 2)
    matrix = np.array([[9, 0, 1], [0, 9, 0], [2, 0, 9]])
    pictures.confusion(tmp_path / "x.png", matrix, ["a", "b", "c"])
    assert drawn["rows"] == drawn["columns"] == ["a", "c"]
