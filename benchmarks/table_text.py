"""The records of a table's runs as Markdown."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import intervals, plan, published, records
from lakd_jax import distill
from lakd_jax.report import summary, table

BASELINE = "kd"

_HEADER = (
    "method",
    "last %",
    "best-on-minival %",
    "last - KD",
    "images/s",
    "memory MiB",
    "train time",
    "published %",
    "note",
)
_WORDS = (0, len(_HEADER) - 1)

Records = Mapping[str, records.Record]


def render(request: plan.Request, jobs: Sequence[plan.Job], kept: Records) -> str:
    """A table a pair, what the columns mean below, and what was run on what."""
    parts, cited = [], []
    for pair in request.pairs:
        own = [job for job in jobs if job.pair == pair and job.seed is not None]
        needed = {job.teacher for job in own}
        teachers = [job for job in jobs if job.name in needed]
        body = [_teacher(request, pair, teachers, own, kept)]
        for method in request.methods:
            mine = [job for job in own if job.method == method]
            body.append(_method(request, pair, mine, own, kept))
            body += _failures(mine, kept)
        cited += [line[-2] for line in body]
        grid = table.grid(_HEADER, body, _WORDS)
        parts.append(f"### {pair[0]} -> {pair[1]}\n\n{grid}")
    return "\n\n".join([*parts, _legend(request, kept, cited)]) + "\n"


def _results(jobs: Iterable[plan.Job], kept: Records) -> dict[int | None, Any]:
    """Of the jobs that are finished, by seed."""
    return {
        job.seed: kept[job.name]["result"]
        for job in jobs
        if "result" in kept.get(job.name, {})
    }


def _last(results: Mapping[Any, Any]) -> dict[Any, float]:
    return {seed: r["test_last"]["accuracy"] for seed, r in results.items()}


def _best(results: Mapping[Any, Any]) -> list[float]:
    tested = [r["test_best_on_minival"] for r in results.values()]
    return [best["accuracy"] for best in tested if best]


def _teacher(
    request: plan.Request,
    pair: tuple[str, str],
    teachers: Sequence[plan.Job],
    students: Sequence[plan.Job],
    kept: Records,
) -> list[str]:
    """Its row: as its students tested it, or as its own training did."""
    name = pair[0]
    told = [r["teacher_test"] for r in _results(students, kept).values()]
    tested = [score["accuracy"] for score in told if score]
    own = _results(teachers, kept)
    tested = tested[:1] or list(_last(own).values())
    best = [f"{100 * accuracy:.2f}" for accuracy in _best(own)]
    note = "given" if name in request.teachers else ""
    for job in teachers:
        if "error" in kept.get(job.name, {}):
            note = f"failed: {first_line(kept[job.name]['error'])}"
    cells = [f"{name}, teacher", f"{100 * tested[0]:.2f}" if tested else "-"]
    cells += [*(best or ["-"]), "-", *_costs(teachers, kept)]
    return [*cells, _published(request.data, pair, "teacher"), note]


def _method(
    request: plan.Request,
    pair: tuple[str, str],
    jobs: Sequence[plan.Job],
    others: Sequence[plan.Job],
    kept: Records,
) -> list[str]:
    """The row of all seeds of a method that are finished."""
    method, results = jobs[0].method, _results(jobs, kept)
    base = _results((job for job in others if job.method == BASELINE), kept)
    difference = None
    if method != BASELINE:
        difference = intervals.paired(_last(results), _last(base))
    return [
        distill.title(method),
        _interval(intervals.of(list(_last(results).values()))),
        _interval(intervals.of(_best(results))),
        difference.text(sign=True) if difference else "-",
        *_costs(jobs, kept),
        _published(request.data, pair, method),
        "; ".join(_notes(jobs, results, kept)),
    ]


def _notes(
    jobs: Sequence[plan.Job], results: Mapping[Any, Any], kept: Records
) -> Iterator[str]:
    together = sorted({r["together"] for r in results.values()} - {1})
    if together:
        yield f"{' or '.join(map(str, together))} seeds in one program"
    missing = [str(job.seed) for job in jobs if job.name not in kept]
    if missing:
        yield f"not run: seed {', '.join(missing)}"


def _failures(jobs: Sequence[plan.Job], kept: Records) -> Iterator[list[str]]:
    """A row for each run that failed."""
    for job in jobs:
        if "error" in kept.get(job.name, {}):
            name = f"{distill.title(job.method)}, seed {job.seed}"
            note = f"failed: {first_line(kept[job.name]['error'])}"
            yield [name, *["-"] * (len(_HEADER) - 2), note]


def first_line(text: str) -> str:
    """Of an error; "no reason given" of an empty one."""
    return next(iter(text.splitlines()), "no reason given")


def _interval(found: intervals.Interval | None) -> str:
    return found.text() if found else "-"


def _costs(jobs: Sequence[plan.Job], kept: Records) -> list[str]:
    """Speed and time as means over the runs, memory as the largest."""
    done = [kept[job.name] for job in jobs if "result" in kept.get(job.name, {})]
    speeds = [s for r in done if (s := r["result"]["images_per_second"]) is not None]
    peaks = [peak for r in done if (peak := _peak(r)) is not None]
    times = [records.seconds(r["result"]) for r in done]
    return [
        f"{statistics.fmean(speeds):,.0f}" if speeds else "-",
        f"{max(peaks) / 2**20:,.0f}" if peaks else "-",
        summary.duration(statistics.fmean(times)) if times else "-",
    ]


def _peak(record: records.Record) -> int | None:
    """Of the device where its backend counts, else of the process."""
    memory = record["memory"] or {"device": None, "process": None}
    return memory["process"] if memory["device"] is None else memory["device"]


def _published(data: str, pair: tuple[str, str], method: str) -> str:
    row = published.find(data, ":".join(pair), method)
    if row is None:
        return "-"
    note = f", {row['note']}" if "note" in row else ""
    return f"{row['top1']:.2f} ({row['source']}{note})"


def _legend(request: plan.Request, kept: Records, cited: Sequence[str]) -> str:
    """What the columns mean, and on what the runs ran."""
    done = [record for record in kept.values() if "result" in record]
    lines = [
        "Test accuracy: mean +- half of the 95 % interval (Student's t) and the number "
        "of seeds. last - KD: of the same seeds, with the interval of the differences. "
        "Time is that of a seed."
    ]
    if any(_peak(record) is not None for record in done):
        on = any((r["memory"] or {}).get("device") is not None for r in done)
        what = "the device" if on else "the process, data and compiler included"
        lines[0] += f" Memory is the peak of {what}."
    letters = {cell.split("(")[1][0] for cell in cited if "(" in cell}
    if letters:
        lines.append(
            "Published numbers are of the full recipe and mostly of the best epoch on "
            f"the test split, 0.1 to 0.5 above the last. {published.sources(letters)}."
        )
    epochs = sorted({record["result"]["epochs"] for record in done})
    if done:
        devices = dict.fromkeys(", ".join(r["devices"]) for r in done)
        commits = dict.fromkeys(str(r["commit"]) for r in done)
        lines.append(
            f"{request.data}, {' or '.join(map(str, epochs))} epochs; "
            f"{' or '.join(devices)}; commit {' or '.join(commits)}."
        )
    return "\n\n".join(lines)
