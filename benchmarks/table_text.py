"""The records of a table's runs as Markdown."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import intervals, plan, published, records
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
_ACCURACIES = (
    "Test accuracy: mean +- half of the 95 % interval (Student's t) and the number "
    "of seeds. last - KD: of the same seeds, with the interval of the differences."
)

Records = Mapping[str, records.Record]


def render(request: plan.Request, jobs: Sequence[plan.Job], kept: Records) -> str:
    """Returns one table per pair, the meaning of the columns, and what ran where."""
    parts, cited = [], []
    for pair in request.pairs:
        students = [job for job in jobs if job.pair == pair and job.seed is not None]
        needed = {job.teacher for job in students}
        teachers = [job for job in jobs if job.name in needed]
        body = [_teacher(request, pair, teachers, students, kept)]
        for arm in request.arms:
            of_arm = [job for job in students if job.arm == arm.name]
            body.append(_arm(request, arm, of_arm, students, kept))
            body += _failures(arm, of_arm, kept)
        cited += [line[-2] for line in body]
        grid = table.grid(_HEADER, body, _WORDS)
        parts.append(f"### {pair[0]} -> {pair[1]}\n\n{grid}")
    return "\n\n".join([*parts, _legend(request, kept, cited)]) + "\n"


def _results(jobs: Iterable[plan.Job], kept: Records) -> dict[int | None, Any]:
    """Returns the results of the jobs that are finished, by seed."""
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
    """Returns the teacher's row: as its students tested it, else as its own run did."""
    name = pair[0]
    scores = [r["teacher_test"] for r in _results(students, kept).values()]
    tested = [score["accuracy"] for score in scores if score]
    results = _results(teachers, kept)
    tested = tested[:1] or list(_last(results).values())
    best = [f"{100 * accuracy:.2f}" for accuracy in _best(results)]
    note = "given" if name in request.teachers else ""
    for job in teachers:
        if "error" in kept.get(job.name, {}):
            note = f"failed: {first_line(kept[job.name]['error'])}"
    cells = [f"{name}, teacher", f"{100 * tested[0]:.2f}" if tested else "-"]
    cells += [*(best or ["-"]), "-", *_costs(teachers, kept)]
    return [*cells, _published(request.data, pair, "teacher"), note]


def compared(arms: Sequence[plan.Arm], jobs: Sequence[plan.Job], kept: Records) -> str:
    """Returns one table of accuracies, for runs that all have the same pair."""
    body = [[arm.title, *_accuracies(arms, arm, jobs, kept)] for arm in arms]
    grid = table.grid((*_HEADER[:4], _HEADER[-1]), body, (0, 4))
    return f"{grid}\n\n{_ACCURACIES}"


def _accuracies(
    arms: Sequence[plan.Arm],
    arm: plan.Arm,
    students: Sequence[plan.Job],
    kept: Records,
) -> list[str]:
    """Returns last, best on minival, the difference to KD, and the seeds not run."""
    jobs = [job for job in students if job.arm == arm.name]
    results, difference = _results(jobs, kept), None
    plain = [a.name for a in arms if a.method == BASELINE and not a.overrides]
    if arm.name not in plain:
        base = _results((job for job in students if job.arm in plain[:1]), kept)
        difference = intervals.paired(_last(results), _last(base))
    missing = [str(job.seed) for job in jobs if job.name not in kept]
    return [
        _interval(intervals.of(list(_last(results).values()))),
        _interval(intervals.of(_best(results))),
        difference.text(sign=True) if difference else "-",
        f"not run: seed {', '.join(missing)}" if missing else "",
    ]


def _arm(
    request: plan.Request,
    arm: plan.Arm,
    jobs: Sequence[plan.Job],
    students: Sequence[plan.Job],
    kept: Records,
) -> list[str]:
    """Returns the row of all seeds of an arm that are finished."""
    *accuracies, missing = _accuracies(request.arms, arm, students, kept)
    # A published number is of the method as it is.
    cited = _published(request.data, jobs[0].pair, arm.method)
    costs = _costs(jobs, kept)
    return [arm.title, *accuracies, *costs, "-" if arm.overrides else cited, missing]


def _failures(
    arm: plan.Arm, jobs: Sequence[plan.Job], kept: Records
) -> Iterator[list[str]]:
    """Yields a row for each run that failed."""
    for job in jobs:
        if "error" in kept.get(job.name, {}):
            name = f"{arm.title}, seed {job.seed}"
            note = f"failed: {first_line(kept[job.name]['error'])}"
            yield [name, *["-"] * (len(_HEADER) - 2), note]


def first_line(text: str) -> str:
    """Returns the first line of an error; "no reason given" if it is empty."""
    return next(iter(text.splitlines()), "no reason given")


def _interval(found: intervals.Interval | None) -> str:
    return found.text() if found else "-"


def _costs(jobs: Sequence[plan.Job], kept: Records) -> list[str]:
    """Returns means of speed and time over the runs, and the largest memory."""
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
    """Returns the peak of the device where its backend counts, else of the process."""
    memory = record["memory"] or {"device": None, "process": None}
    return memory["process"] if memory["device"] is None else memory["device"]


def _published(data: str, pair: tuple[str, str], method: str) -> str:
    row = published.find(data, ":".join(pair), method)
    if row is None:
        return "-"
    note = f", {row['note']}" if "note" in row else ""
    return f"{row['top1']:.2f} ({row['source']}{note})"


def _legend(request: plan.Request, kept: Records, cited: Sequence[str]) -> str:
    """Returns what the columns mean, and where the runs ran."""
    done = [record for record in kept.values() if "result" in record]
    lines = [f"{_ACCURACIES} Time is that of a seed."]
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
