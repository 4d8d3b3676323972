"""Trains pairs by several methods and seeds, and writes the table of their results.

    python -m benchmarks.table --data=digits --pairs=resnet20:resnet8 \\
        --methods=none,kd,lakd --seeds=3 --budget=0.5 --out=runs/table
    python -m benchmarks.table --data=cifar100 --pairs=resnet56:resnet20,vgg13:vgg8 \\
        --methods=none,kd,dkd+at --arm "LAKD uncut=lakd:local.cut_scale=1" \\
        --seeds=3 --budget=24 --out=runs/cifar100 \\
        --teacher=vgg13=weights/vgg13.pth --override=data.source=folder:IMAGES
    python -m benchmarks.table --plan resnet8 rates --images=DIR --weights=DIR

The recipe is that of configs/cifar100.py and so on. The plan is printed first; the same
command continues where it was stopped, inside a run, too, and makes no finished run
again. The command may be given several times at once: the processes share the runs.
Every run is a process of its own and leaves one file below --out/records: its command,
versions, device, commit, and its result or its error. A teacher is trained once for all
arms and pairs, or given. The table is kept up to date in --out/table.md.

With --epochs, milestones and warm-ups shrink in proportion. Once --budget hours are
over no run is started; what is left is listed. Failed runs are not tried again unless
--retry is given.

--plan makes comparisons of RESULTS.md (benchmarks/named_plans.py lists them). Finished
runs are added to --record/NAME.json, and runs recorded there are not made again; the
runs' directories are --out/NAME/TITLE-SEED.
"""

import argparse
import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import flag_types, named_plans, plan, records, table_text
from lakd_jax import cli, errors
from lakd_jax.report import summary
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir

RESULTS = Path(__file__).parent / "results"
TABLE = "table.md"
_REPORT = "ended.json"
_LOG = "log.txt"
_POLL_SECONDS = 0.1
_PAUSE_SECONDS = 2.0  # while other processes train teachers
_TAIL = 5  # lines of a log that say why a process died

# What a named plan sets itself, and what only it needs.
_OF_TABLES = ("data", "pairs", "methods", "arm", "seeds", "epochs", "override")
_OF_TABLES += ("teacher", "retry")
_COMPARE = Path("runs/compare")  # --out of plans
_OF_PLANS = ("images", "images100", "weights", "record")


@dataclasses.dataclass(frozen=True)
class Series:
    """Runs that end in one table.

    Attributes:
      title: for people.
      out: directory of the table.
      prepare: makes what the runs that are left need, or raises ConfigError.
    """

    title: str
    jobs: Sequence[plan.Job]
    out: Path
    store: records.Folder | records.File
    render: Callable[[Mapping[str, records.Record]], str]
    prepare: Callable[[Sequence[plan.Job]], None] = lambda waiting: None


class Harness:
    """The runs of a series, as far as they are made."""

    def __init__(self, series: Series, guard: interrupt.Guard, retry: bool = False):
        self._series, self._guard = series, guard
        if retry:
            series.store.forget_failures(series.jobs)
        self.kept = series.store.read(series.jobs)

    def waiting(self) -> list[plan.Job]:
        """Returns jobs that neither ended nor wait for a teacher that failed."""
        return [
            job
            for job in self._series.jobs
            if job.name not in self.kept
            and "error" not in self.kept.get(job.teacher, {})
        ]

    def _has_teacher(self, job: plan.Job) -> bool:
        return not job.teacher or "result" in self.kept.get(job.teacher, {})

    def run(self, deadline: float) -> None:
        """Makes what is waiting until `deadline`, a time of time.monotonic().

        Runs of other processes are left to them; their teachers are waited for.

        Raises:
          interrupt.Interrupted: a signal came; what is finished is recorded.
        """
        while True:
            for job in self.waiting():
                if time.monotonic() >= deadline:
                    print("The budget is used up; no run is started.", flush=True)
                    return
                self._guard.check()
                if self._has_teacher(job):
                    self._make_if_free(job)
            self._refresh()
            if all(map(self._has_teacher, self.waiting())):
                return
            time.sleep(_PAUSE_SECONDS)

    def _refresh(self) -> None:
        self.kept |= self._series.store.read(self._series.jobs)

    def _make_if_free(self, job: plan.Job) -> None:
        with records.claimed(job.directory) as is_free:
            self._refresh()  # it may have ended since
            if is_free and job.name not in self.kept:
                print(f"{self._left()}\n{_names([job])}", flush=True)
                self._make(job)
                self.write()

    def _left(self) -> str:
        waiting = self.waiting()
        seconds, unknown = records.estimate(waiting, self._series.jobs, self.kept)
        text = f"runs left: {len(waiting)}"
        if unknown < len(waiting):
            text += f", about {summary.duration(seconds)}"
        if 0 < unknown < len(waiting):
            text += f" without the {unknown} of pairs not timed yet"
        return text

    def _make(self, job: plan.Job) -> None:
        result = job.directory / workdir.RESULT
        was_finished = result.exists()
        report = _process(job.argv, job.directory, self._guard)
        ended: records.Record = {"error": report.get("error", "left no result")}
        if result.exists():
            # The memory of a process that finds a finished run is not that of the run.
            memory = None if was_finished else report.get("memory")
            ended = {"result": workdir.read_json(result), "memory": memory}
        self.kept[job.name] = self._series.store.add(job, ended)
        if "error" in ended:
            why = table_text.first_line(ended["error"])
            print(f"  {_names([job])} failed: {why}", flush=True)

    def plan_text(self) -> str:
        """Returns what will be made, arm by arm, and what exists already."""
        lines = []
        for label in dict.fromkeys(job.label for job in self._series.jobs):
            jobs = [job for job in self._series.jobs if job.label == label]
            ended = [self.kept[job.name] for job in jobs if job.name in self.kept]
            failed = sum("error" in record for record in ended)
            counts = {
                "to make": len(jobs) - len(ended),
                "finished": len(ended) - failed,
                "failed": failed,
            }
            text = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
            lines.append(f"  {_names(jobs)}: {text}")
        return "\n".join([*lines, self._left()])

    def table(self) -> str:
        """Returns the results so far."""
        return self._series.render(self.kept)

    def write(self) -> None:
        """Writes the table to its file."""
        self._series.out.mkdir(parents=True, exist_ok=True)
        workdir.write_bytes(self._series.out / TABLE, self.table().encode())


def _names(jobs: Sequence[plan.Job]) -> str:
    """Jobs that differ by their seed alone, in a few words."""
    if jobs[0].seed is None:
        return jobs[0].label
    return f"{jobs[0].label}, seed {', '.join(str(job.seed) for job in jobs)}"


def _process(
    command: Sequence[str], directory: Path, guard: interrupt.Guard
) -> dict[str, Any]:
    """Runs `benchmarks.one`; returns its report, or {"error": how it died}.

    Raises:
      interrupt.Interrupted: it was stopped, and has saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    report = directory / _REPORT
    report.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "benchmarks.one", str(report), *command]
    with open(directory / _LOG, "ab") as log:
        # A session of its own, so that Ctrl-C reaches it once: through this process.
        child = subprocess.Popen(
            argv,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        is_stopping = False
        while child.poll() is None:
            if guard.requested and not is_stopping:
                child.terminate()
                is_stopping = True
            time.sleep(_POLL_SECONDS)
    if report.exists():
        return workdir.read_json(report)
    if is_stopping or child.returncode == 0:
        raise interrupt.Interrupted
    lines = (directory / _LOG).read_text(errors="replace").splitlines()[-_TAIL:]
    ended = f"the process ended with code {child.returncode}"
    return {"error": "\n".join([ended, *lines])}


def check(jobs: Sequence[plan.Job]) -> str:
    """Returns the device of the runs, from a process that releases it again.

    Raises:
      errors.ConfigError: with every fault of the jobs' configurations.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one", "check"],
        input=json.dumps([job.argv for job in jobs]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if found["problems"]:
        raise errors.ConfigError(found["problems"])
    return found["device"]


def make(
    series: Series, deadline: float, guard: interrupt.Guard, retry: bool = False
) -> None:
    """Plans, trains and prints; see the module."""
    harness = Harness(series, guard, retry)
    waiting, title = harness.waiting(), series.title
    if waiting:
        series.prepare(waiting)
        # Seeds of an arm differ in nothing that could be wrong.
        title += f" on {check(list({job.label: job for job in waiting}.values()))}"
    print(f"{title}\n{harness.plan_text()}", flush=True)
    try:
        harness.run(deadline)
    finally:
        harness.write()
    print(f"\n{harness.table()}\nIn {series.out / TABLE}", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = "digits, cifar10, cifar100 or folder:DIR with CIFAR-10's recipe"
    arm = "TITLE=METHOD[:FIELD=VALUE,...]: a method with fields of its own; repeatable"
    parser.add_argument("--data", help=data)
    parser.add_argument("--pairs", help="TEACHER:STUDENT,...")
    parser.add_argument("--methods", help="e.g. none,kd,dkd+at")
    parser.add_argument("--arm", action="append", default=[], help=arm)
    parser.add_argument("--seeds", type=int, help="how many, from 0; 3 unless given")
    parser.add_argument("--epochs", default=0, type=int, help="0: as in the recipe")
    parser.add_argument("--override", action="append", default=[], help="FIELD=VALUE")
    parser.add_argument("--teacher", action="append", default=[], help="NAME=PATH")
    parser.add_argument("--retry", action="store_true", help="failed runs, too")
    parser.add_argument("--budget", default=math.inf, type=float, help="hours")
    parser.add_argument("--out", type=flag_types.path, help="directory")
    group = parser.add_argument_group("comparisons of RESULTS.md")
    group.add_argument(
        "--plan",
        nargs="+",
        default=[],
        choices=named_plans.PLANS,
        metavar="NAME",
        help=", ".join(named_plans.PLANS),
    )
    group.add_argument("--images", type=flag_types.path, help="folder of CIFAR-10")
    group.add_argument("--images100", type=flag_types.path, help="folder of CIFAR-100")
    group.add_argument("--weights", type=flag_types.path, help="of PyTorch checkpoints")
    record = "folder of NAME.json, benchmarks/results unless given"
    group.add_argument("--record", type=flag_types.path, help=record)
    return parser.parse_args(argv)


def series_of(chosen: argparse.Namespace) -> list[Series]:
    """Returns the requested series of runs; ConfigError names the faults."""
    others, word = (_OF_TABLES, "with") if chosen.plan else (_OF_PLANS, "without")
    faults = [
        f"--{name}: cannot be given {word} --plan"
        for name in others
        if getattr(chosen, name) not in (None, [], 0, False)
    ]
    if faults:
        raise errors.ConfigError(faults)
    if not chosen.plan:
        return [_table(request_of(chosen))]
    return [_named(name, chosen) for name in chosen.plan]


def _named(name: str, chosen: argparse.Namespace) -> Series:
    given = {n: getattr(chosen, flag) for n, flag in named_plans.FLAGS.items()}
    places = {name: place for name, place in given.items() if place}
    wanted, out = named_plans.PLANS[name], (chosen.out or _COMPARE) / name
    jobs = named_plans.jobs(wanted, places, out)
    return Series(
        title=name,
        jobs=jobs,
        out=out,
        store=named_plans.store(wanted, (chosen.record or RESULTS) / f"{name}.json"),
        render=functools.partial(named_plans.render, wanted, jobs),
        prepare=functools.partial(named_plans.prepare, wanted, places, out),
    )


def _table(request: plan.Request) -> Series:
    jobs = plan.jobs(request)
    store = records.Folder(request.out / "records")
    render = functools.partial(table_text.render, request, jobs)
    return Series(request.data, jobs, request.out, store, render)


def request_of(chosen: argparse.Namespace) -> plan.Request:
    """Returns the request of a table; ConfigError names the faults."""
    faults = [
        f"--{name}: is missing"
        for name in ("data", "pairs", "out")
        if not getattr(chosen, name)
    ]
    if not chosen.methods and not chosen.arm:
        faults.append("--methods or --arm: is missing")
    faults += [
        f"--teacher={given}: must be NAME=PATH"
        for given in chosen.teacher
        if not all(given.partition("="))
    ]
    known = ("digits", "cifar10", "cifar100", "svhn", "cinic10")
    data = chosen.data or "digits"
    if data not in known and not data.removeprefix(plan.FOLDER):
        faults.append(f"--data={data}: names no folder")
    if data not in known and not data.startswith(plan.FOLDER):
        faults.append(f"--data={data}: must be {', '.join(known)} or folder:DIR")
    seeds = 3 if chosen.seeds is None else chosen.seeds
    faults += [f"--seeds={seeds}: must be at least 1"] if seeds < 1 else []
    faults += ["--epochs: must not be negative"] if chosen.epochs < 0 else []
    if faults:
        raise errors.ConfigError(faults)
    teachers = [given.partition("=") for given in chosen.teacher]
    arms = plan.methods(chosen.methods) if chosen.methods else ()
    request = plan.Request(
        data=chosen.data,
        pairs=plan.pairs(chosen.pairs),
        arms=(*arms, *map(plan.arm, chosen.arm)),
        seeds=tuple(range(seeds)),
        epochs=chosen.epochs,
        overrides=tuple(chosen.override),
        teachers={name: path for name, _, path in teachers},
        out=chosen.out,
    )
    plan.require(request)
    return request


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and makes the tables."""
    chosen = parse(argv)
    # The runs' processes need the accelerator; this one must not take hold of it.
    jax.config.update("jax_platforms", "cpu")

    def work(guard: interrupt.Guard) -> None:
        deadline = time.monotonic() + 3600 * chosen.budget
        for series in series_of(chosen):
            make(series, deadline, guard, chosen.retry)

    cli.end_with(work)


if __name__ == "__main__":
    main()
