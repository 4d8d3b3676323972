"""Renders the records of `benchmarks.throughput` as a Markdown table."""

from collections.abc import Iterator, Sequence
from typing import Any

_COLUMNS = (
    "device",
    "teacher, student",
    "batch",
    "dtype",
    "method",
    "who",
    "images/s",
    "ms/step (min to max)",
    "takes x ours (quartiles)",
    "first step s",
    "roofline",
)


def render(records: Sequence[dict[str, Any]]) -> str:
    """Returns one line per subject, in the order of the records.

    The ratio is the median of pairs of neighbouring rounds; above 1, ours is faster.
    """
    head = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    return "\n".join(head + [_line(row) for r in records for row in _rows(r)])


def only(record: dict[str, Any], method: str) -> dict[str, Any]:
    """Returns the record with one method only."""
    return record | {"methods": {method: record["methods"][method]}}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rows(record: dict[str, Any]) -> Iterator[list[str]]:
    pair = ", ".join(record["pair"])
    for method, own in sorted(record["methods"].items()):
        where = [record["device"], pair, str(record["batch"]), record["dtype"], method]
        for name, subject in sorted(own["subjects"].items(), key=_ours_first):
            yield [*where, name, *_figures(subject, own["ratios"].get(name))]
        for name, reason in own["failed"].items():
            yield [*where, name, reason.replace("|", "/"), "", "", "", ""]


def _ours_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != "ours", item[0]


def _figures(subject: dict[str, Any], ratio: dict[str, float] | None) -> list[str]:
    step, reached = subject["step_s"], subject.get("reached")
    low, middle, high = (1000 * step[key] for key in ("min", "median", "max"))
    times, share = "1", ""
    if ratio:
        times = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
    if reached:
        share = f"{100 * reached['roofline_share']:.0f} % {reached['bound']}"
    return [
        f"{subject['images_per_s']:,.0f}",
        f"{middle:.1f} ({low:.1f} to {high:.1f})",
        times,
        f"{subject['first_step_s']:.1f}",
        share,
    ]
