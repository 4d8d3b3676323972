"""Renders the records of `benchmarks.throughput` as Markdown tables."""

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


_OF_TRAININGS = (
    "device",
    "teacher, student",
    "batch",
    "method",
    "who",
    "ms/step",
    "takes x ours (quartiles)",
    "CPU ms/step",
    "x ours (quartiles)",
    "peak MiB",
    "x ours",
    "first step s",
    "top-1 %",
)


def render(records: Sequence[dict[str, Any]]) -> str:
    """Returns one line per subject, in the order of the records.

    Trainings on real images (`same_run`) have a table of their own, the second. The
    ratio is the median of pairs of neighbouring rounds; above 1, ours is faster.
    """
    tables = []
    for columns, rows, trained in (
        (_COLUMNS, _rows, False),
        (_OF_TRAININGS, _rows_of_trainings, True),
    ):
        chosen = [r for r in records if ("epochs" in r) == trained]
        if chosen:
            head = [_line(columns), _line(["---"] * len(columns))]
            lines = head + [_line(row) for r in chosen for row in rows(r)]
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


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
    share = ""
    if reached:
        share = f"{100 * reached['roofline_share']:.0f} % {reached['bound']}"
    return [
        f"{subject['images_per_s']:,.0f}",
        f"{middle:.1f} ({low:.1f} to {high:.1f})",
        _times(ratio),
        f"{subject['first_step_s']:.1f}",
        share,
    ]


def _rows_of_trainings(record: dict[str, Any]) -> Iterator[list[str]]:
    pair = ", ".join(record["pair"])
    for method, own in sorted(record["methods"].items()):
        where = [record["device"], pair, str(record["batch"]), method]
        first = own["subjects"]["ours"]
        for name, subject in sorted(own["subjects"].items(), key=_ours_first):
            cells = [*where, name]
            for kind in ("step_s", "cpu_s"):
                cells.append(f"{1000 * subject[kind]['median']:.1f}")
                cells.append(_times(own["ratios"][kind].get(name)))
            peak = subject["peak_bytes"]
            cells += [f"{peak / 2**20:,.0f}", f"{peak / first['peak_bytes']:.2f}"]
            share = subject["right"] / own["test_images"]
            yield [*cells, f"{subject['first_step_s']:.1f}", f"{100 * share:.2f}"]
        for name, reason in own["failed"].items():
            yield [*where, name, reason.replace("|", "/"), *[""] * 7]


def _times(ratio: dict[str, float] | None) -> str:
    if not ratio:
        return "1"
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
