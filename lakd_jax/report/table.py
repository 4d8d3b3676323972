"""Renders the results of runs as a table: aligned text that is also Markdown."""

import dataclasses
import statistics
from collections.abc import Callable, Collection, Sequence

from lakd_jax.report import summary


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, or one network that was only evaluated (a teacher).

    Accuracies are fractions of 1. Values that do not apply are None, shown as "-".

    Attributes:
      name: network and method, e.g. "resnet20, LAKD".
      test_last: test accuracy of the last checkpoint; None for a teacher of other
        classes.
      test_best: test accuracy of the checkpoint that was best on minival.
      examples: number of test images.
      parameters: number of trainable parameters of the deployed network.
      seconds: training time.
      images_per_second: training speed.
      note: shown in a last column, which exists if any row has a note.
    """

    name: str
    test_last: float | None
    test_best: float | None
    examples: int
    parameters: int
    seconds: float | None
    images_per_second: float | None
    note: str = ""


_HEADER = (
    "network / method",
    "last %",
    "best-on-minival %",
    "parameters",
    "train time",
    "images/s",
)


def render(rows: Sequence[Row]) -> str:
    """Returns one line per row, followed by the number of test images."""
    return _render([[row] for row in rows], lambda accuracies: _percent(accuracies[0]))


def render_seeds(rows: Sequence[Row]) -> str:
    """Returns one line per name: "mean +- sd (n)" over the rows of that name.

    sd is the sample standard deviation, in percentage points. Training time and
    speed are means; parameters and note are those of the first row.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    return _render([*groups.values()], _spread)


def _render(
    groups: Sequence[Sequence[Row]],
    accuracy: Callable[[Sequence[float | None]], str],
) -> str:
    """Returns one line per group, with `accuracy` as the text of its accuracies."""
    header, left = list(_HEADER), [0]
    body = [
        [
            group[0].name,
            accuracy([row.test_last for row in group]),
            accuracy([row.test_best for row in group]),
            *_costs(group),
        ]
        for group in groups
    ]
    if any(group[0].note for group in groups):
        left.append(len(header))
        header.append("note")
        body = [[*line, g[0].note] for line, g in zip(body, groups, strict=True)]
    tested = [row for group in groups for row in group if row.test_last is not None]
    counts = sorted({row.examples for row in tested})
    text = grid(header, body, left)
    if not counts:
        return text
    shown = " or ".join(f"{n:,}" for n in counts)
    return f"{text}\n\nAccuracy on {shown} test images."


def summarise(values: Sequence[float]) -> tuple[float, float | None, int]:
    """Returns the mean, sample standard deviation (None for one value) and count.

    Raises:
      ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("values is empty: it has no mean")
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation, len(values)


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f}"


def _spread(accuracies: Sequence[float | None]) -> str:
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if not known:
        return "-"
    mean, deviation, count = summarise(known)
    middle = "" if deviation is None else f" +- {100 * deviation:.2f}"
    return f"{_percent(mean)}{middle} ({count})"


def _costs(group: Sequence[Row]) -> list[str]:
    seconds = [row.seconds for row in group if row.seconds is not None]
    speeds = [r.images_per_second for r in group if r.images_per_second is not None]
    return [
        f"{group[0].parameters:,}",
        summary.duration(statistics.fmean(seconds)) if seconds else "-",
        f"{statistics.fmean(speeds):,.0f}" if speeds else "-",
    ]


def grid(
    header: Sequence[str], body: Sequence[Sequence[str]], left: Collection[int]
) -> str:
    """Returns a Markdown table whose columns are also aligned as plain text.

    Args:
      header: column names.
      body: rows, each with one cell per column.
      left: indices of the left-aligned columns (words); others are right-aligned.
    """
    lines = [[_escape(cell) for cell in line] for line in (header, *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [
        ":" + "-" * (width - 1) if i in left else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    padded = [
        [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    padded.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def _escape(cell: str) -> str:
    # A bar or a line break would end the cell.
    return " ".join(cell.split()).replace("|", "\\|")
