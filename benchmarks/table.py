"""Trains pairs by several methods and seeds, and writes the table of their results.

    python -m benchmarks.table --data=digits --pairs=resnet20:resnet8 \\
        --methods=none,kd,lakd --seeds=3 --budget=0.5 --out=runs/table
    python -m benchmarks.table --data=cifar100 --pairs=resnet56:resnet20,vgg13:vgg8 \\
        --methods=none,kd,dkd+at --seeds=3 --budget=24 --out=runs/cifar100 \\
        --teacher=vgg13=weights/vgg13.pth --override=data.source=folder:IMAGES

The recipe is that of configs/cifar100.py and so on. The plan is printed first; the same
command goes on where it was stopped, inside a run, too, and makes no finished run
again. Every run is a process of its own (several seeds of a method on an accelerator
are one program) and leaves one file below --out/records: its command, versions,
device, commit, and its result or its error. A teacher is trained once for all methods
and pairs, or given. The table is kept up to date in --out/table.md.

With --epochs, milestones and warm-ups shrink in proportion. Once --budget hours are
over no run is started; what is left is listed. Failed runs are not tried again unless
--retry is given.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import flag_types, plan, records, table_text
from lakd_jax import cli, errors
from lakd_jax.report import summary
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir

TABLE = "table.md"
_TOLD = "told.json"
_LOG = "log.txt"
_POLL_SECONDS = 0.1
_TAIL = 5  # lines of a log that say why a process died


class Harness:
    """The runs of one table, as far as they are made."""

    def __init__(self, request: plan.Request, guard: interrupt.Guard, retry: bool):
        self._request, self._guard = request, guard
        self.jobs = plan.jobs(request)
        self.kept = records.read(request.out, self.jobs)
        if retry:
            self.kept = {k: r for k, r in self.kept.items() if "error" not in r}

    def waiting(self) -> list[plan.Job]:
        """Jobs that neither finished nor failed, nor wait for a failed teacher."""
        return [j for j in self.jobs if j.name not in self.kept and not self._lost(j)]

    def _lost(self, job: plan.Job) -> bool:
        return "error" in self.kept.get(job.teacher, {})

    def run(self, deadline: float, *, together: bool) -> None:
        """Makes what is waiting until `deadline`, a time of time.monotonic().

        Raises:
          interrupt.Interrupted: a signal came; what is finished is recorded.
        """
        for group in plan.groups(self.waiting(), together=together):
            if self._lost(group[0]):
                continue
            if time.monotonic() >= deadline:
                print("The budget is used up; no more runs are started.", flush=True)
                break
            self._guard.check()
            print(f"{self._left()}\n{_names(group)}", flush=True)
            self._make(group)
            self.write()

    def _left(self) -> str:
        waiting = self.waiting()
        seconds, unknown = records.estimate(waiting, self.jobs, self.kept)
        text = f"runs left: {len(waiting)}"
        if unknown < len(waiting):
            text += f", about {summary.duration(seconds)}"
        if 0 < unknown < len(waiting):
            text += f" without the {unknown} of pairs not timed yet"
        return text

    def _make(self, group: Sequence[plan.Job]) -> None:
        directory, command = group[0].directory, plan.command(group)
        began = all((job.run / workdir.RESULT).exists() for job in group)
        ended = _process(command, directory, self._guard)
        if began:  # made before, in a process that could not tell of it
            ended.pop("memory", None)
        text = f"python main.py {shlex.join(command)}"
        for job in group:
            done = job.run / workdir.RESULT
            own: dict[str, Any] = {"error": ended.get("error", "left no result")}
            if done.exists():
                own = {
                    "result": workdir.read_json(done),
                    "memory": ended.get("memory"),
                }
            record = records.write(self._request.out, job, text, own)
            self.kept[job.name] = record
            if "error" in own:
                why = table_text.first_line(own["error"])
                print(f"  {job.name} failed: {why}", flush=True)

    def plan_text(self) -> str:
        """What will be made, pair by pair, and what is already there."""
        lines = []
        for place in dict.fromkeys(job.directory for job in self.jobs):
            own = [job for job in self.jobs if job.directory == place]
            ended = [self.kept[job.name] for job in own if job.name in self.kept]
            failed = sum("error" in record for record in ended)
            counts = {
                "to make": len(own) - len(ended),
                "finished": len(ended) - failed,
                "failed": failed,
            }
            told = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
            lines.append(f"  {_names(own)}: {told}")
        return "\n".join([*lines, self._left()])

    def table(self) -> str:
        """The results so far."""
        return table_text.render(self._request, self.jobs, self.kept)

    def write(self) -> None:
        """The table, for those who look on."""
        self._request.out.mkdir(parents=True, exist_ok=True)
        text = self.table().encode()
        workdir.write_bytes(self._request.out / TABLE, text)


def _names(group: Sequence[plan.Job]) -> str:
    """Jobs that differ by their seed alone, in a few words."""
    first = group[0]
    if first.seed is None:
        return f"{first.pair[0]}, teacher"
    seeds = ", ".join(str(job.seed) for job in group)
    return f"{first.pair[0]} -> {first.pair[1]}, {first.method}, seed {seeds}"


def _process(
    command: Sequence[str], directory: Path, guard: interrupt.Guard
) -> dict[str, Any]:
    """Runs `benchmarks.one`; what it told, or {"error": how it died}.

    Raises:
      interrupt.Interrupted: it was stopped, and has saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    told = directory / _TOLD
    told.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "benchmarks.one", str(told), *command]
    with open(directory / _LOG, "ab") as log:
        # A session of its own, so that Ctrl-C reaches it once: through this process.
        child = subprocess.Popen(
            argv,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        asked = False
        while child.poll() is None:
            if guard.requested and not asked:
                child.terminate()
                asked = True
            time.sleep(_POLL_SECONDS)
    if told.exists():
        return workdir.read_json(told)
    if asked or child.returncode == 0:
        raise interrupt.Interrupted
    lines = (directory / _LOG).read_text(errors="replace").splitlines()[-_TAIL:]
    ended = f"the process ended with code {child.returncode}"
    return {"error": "\n".join([ended, *lines])}


def check(jobs: Sequence[plan.Job]) -> dict[str, Any]:
    """The device of the runs, in a process that gives it back.

    Raises:
      errors.ConfigError: with every fault of the jobs' configurations.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one", "check"],
        input=json.dumps([plan.command([job]) for job in jobs]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if found["problems"]:
        raise errors.ConfigError(found["problems"])
    return found


def make(
    request: plan.Request, hours: float, guard: interrupt.Guard, *, retry: bool
) -> None:
    """Plans, trains and prints; see the module."""
    deadline = time.monotonic() + 3600 * hours
    plan.require(request)
    harness = Harness(request, guard, retry)
    # Seeds of a method differ in nothing that could be wrong.
    found = check([j for j in harness.jobs if j.seed in (None, request.seeds[0])])
    print(f"{request.data} on {found['device']}\n{harness.plan_text()}", flush=True)
    try:
        harness.run(deadline, together=found["platform"] != "cpu")
    finally:
        harness.write()
    print(f"\n{harness.table()}\nIn {request.out / TABLE}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = "digits, cifar10, cifar100 or folder:DIR with CIFAR-10's recipe"
    parser.add_argument("--data", required=True, help=data)
    parser.add_argument("--pairs", required=True, help="TEACHER:STUDENT,...")
    parser.add_argument("--methods", required=True, help="e.g. none,kd,dkd+at")
    parser.add_argument("--seeds", default=3, type=int, help="how many, from 0")
    parser.add_argument("--budget", required=True, type=float, help="hours")
    parser.add_argument("--epochs", default=0, type=int, help="0: as in the recipe")
    parser.add_argument("--override", action="append", default=[], help="FIELD=VALUE")
    parser.add_argument("--teacher", action="append", default=[], help="NAME=PATH")
    parser.add_argument("--out", required=True, type=flag_types.path, help="directory")
    parser.add_argument("--retry", action="store_true", help="failed runs, too")
    return parser.parse_args(argv)


def request_of(chosen: argparse.Namespace) -> plan.Request:
    """The command line as a request; ConfigError names what is wrong with it."""
    faults = [
        f"--teacher={given}: must be NAME=PATH"
        for given in chosen.teacher
        if not all(given.partition("="))
    ]
    known = ("digits", "cifar10", "cifar100")
    if chosen.data not in known and not chosen.data.removeprefix(plan.FOLDER):
        faults.append(f"--data={chosen.data}: names no folder")
    if chosen.data not in known and not chosen.data.startswith(plan.FOLDER):
        faults.append(f"--data={chosen.data}: must be {', '.join(known)} or folder:DIR")
    faults += (
        [f"--seeds={chosen.seeds}: must be at least 1"] if chosen.seeds < 1 else []
    )
    faults += ["--epochs: must not be negative"] if chosen.epochs < 0 else []
    if faults:
        raise errors.ConfigError(faults)
    teachers = [given.partition("=") for given in chosen.teacher]
    return plan.Request(
        data=chosen.data,
        pairs=plan.pairs(chosen.pairs),
        methods=plan.methods(chosen.methods),
        seeds=tuple(range(chosen.seeds)),
        epochs=chosen.epochs,
        overrides=tuple(chosen.override),
        teachers={name: path for name, _, path in teachers},
        out=chosen.out,
    )


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and makes the table."""
    chosen = _parse(argv)
    # The runs' processes need the accelerator; this one must not take hold of it.
    jax.config.update("jax_platforms", "cpu")
    cli.end_with(
        lambda guard: make(request_of(chosen), chosen.budget, guard, retry=chosen.retry)
    )


if __name__ == "__main__":
    main()
