"""Draws attention matrices, confusion matrices and trees."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lakd_jax.report import canvas

_CELL, _MARGIN = 26, 150  # pixels
_DRAWN = 60  # classes of a confusion matrix
_NODE = 150  # spacing of a tree's nodes


@canvas.any_script()
def matrices(
    path: canvas.Path,
    panels: Sequence[tuple[str, np.ndarray]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
) -> None:
    """Draws matrices of one shape in a column, on a common colour scale from 0.

    Args:
      path: image file to write; the suffix selects the format.
      panels: (title, matrix (R, C) of non-negative values), at least one.
      rows, columns: R and C labels.
      row_title, column_title: titles of the two axes.
    """
    height, width = panels[0][1].shape
    size = (max(700, width * _CELL + 2 * _MARGIN), len(panels) * (height * _CELL + 130))
    figure = canvas.new_figure(*size)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    top = max(float(matrix.max()) for _, matrix in panels)
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        image = axis.imshow(matrix, vmin=0, vmax=top, cmap="viridis", aspect="equal")
        axis.set_title(title, fontsize=9, loc="left", color=canvas.INK)
        _ticks(axis, rows, columns)
        axis.set_ylabel(row_title, fontsize=8)
        figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02).ax.tick_params(
            labelsize=7
        )
    axes[-1].set_xlabel(column_title, fontsize=8)
    figure.tight_layout()
    canvas.save(figure, path)


def confusion(path: canvas.Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Draws a confusion matrix as shares of each row.

    Args:
      path: image file to write; the suffix selects the format.
      matrix: (K, K) counts, rows are the true classes; of more than `_DRAWN` classes,
        those with most errors are drawn.
      classes: K names.
    """
    errors = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    kept = np.sort(np.argsort(-errors, kind="stable")[:_DRAWN])
    names = [classes[k] for k in kept]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    title = "share of each true class"
    if len(kept) < len(classes):
        title += f"; {len(kept)} of {len(classes)} classes, most errors"
    matrices(
        path,
        [(title, shares[np.ix_(kept, kept)])],
        rows=names,
        columns=names,
        row_title="true class",
        column_title="answer",
    )


def _ticks(axis: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    axis.set_yticks(range(len(rows)), [canvas.cut(r, 18) for r in rows], fontsize=7)
    labels = [canvas.cut(c, 18) for c in columns]
    axis.set_xticks(range(len(columns)), labels, fontsize=7, rotation=90)
    for text in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        text.set_parse_math(False)


@canvas.any_script()
def tree(
    path: canvas.Path,
    levels: Sequence[Sequence[tuple[str, int | None, float]]],
) -> None:
    """Draws a tree with its root at the top.

    Args:
      path: image file to write; the suffix selects the format.
      levels: from the root's children down, nodes as (label, index of the parent in
        the level above, weight of the edge in [0, 1]); a parent of None is the root.
    """
    widest = max(len(level) for level in levels)
    figure = canvas.new_figure(
        max(600, widest * _NODE * 2 // 3), 130 * (len(levels) + 1)
    )
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(-len(levels) - 0.6, 0.6))
    above = [0.5]
    _node(axis, 0.5, 0, "image")
    for depth, level in enumerate(levels, 1):
        places = [(i + 0.5) / len(level) for i in range(len(level))]
        for x, (label, parent, weight) in zip(places, level, strict=True):
            start = above[parent or 0]
            axis.plot(
                (start, x),
                (1 - depth - 0.12, -depth + 0.12),
                color="#0072B2",
                linewidth=0.6 + 3 * weight,
                alpha=0.7,
                zorder=1,
            )
            leaf = depth == len(levels)
            _node(axis, x, -depth, label, rotation=90 if leaf and widest > 20 else 0)
        above = places
    canvas.save(figure, path)


def _node(axis: Any, x: float, y: float, label: str, rotation: int = 0) -> None:
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "#999999"}
    text = canvas.cut(label, 14)
    style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": canvas.INK}
    axis.text(x, y, text, bbox=box, rotation=rotation, parse_math=False, **style)
