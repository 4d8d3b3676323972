"""What is known of each training of a table: one JSON file a run, failures included."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plan
from lakd_jax import errors
from lakd_jax.store import workdir

Record = dict[str, Any]


def path(out: Path, job: plan.Job) -> Path:
    """The record of a job."""
    return out / "records" / f"{job.name}.json"


def read(out: Path, jobs: Iterable[plan.Job]) -> dict[str, Record]:
    """The records there are, by the jobs' names.

    Raises:
      errors.WorkdirError: one is of another command, e.g. of other epochs.
    """
    found: dict[str, Record] = {}
    for job in jobs:
        file = path(out, job)
        if not file.exists():
            continue
        found[job.name] = record = workdir.read_json(file)
        if record["settings"] != list(job.command):
            others = set(record["settings"]) ^ set(job.command)
            raise errors.WorkdirError(
                f"{file}: is of another command, which differs in "
                f"{' '.join(sorted(others))}\nUse another --out."
            )
    return found


def write(out: Path, job: plan.Job, command: str, ended: Record) -> Record:
    """Keeps how a job ended; returns the record.

    Args:
      command: that was run.
      ended: {"error": text}, or {"result": as in result.json, "memory": peaks}.
    """
    known: Record = {}
    environment = job.run / workdir.ENVIRONMENT
    if environment.exists():
        own = workdir.read_json(environment)
        known = {k: own[k] for k in ("versions", "commit", "devices", "platform")}
    record = {
        "pair": list(job.pair),
        "method": job.method,
        "seed": job.seed,
        "settings": list(job.command),
        "command": command,
        **known,
        **ended,
    }
    file = path(out, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_json(file, record)
    return record


def seconds(result: Mapping[str, Any]) -> float:
    """What one of the seeds that were trained together took, both stages of an HME."""
    first = result.get("stage1", {"seconds": 0.0})["seconds"]
    return (result["seconds"] + first) / result["together"]


def estimate(
    waiting: Sequence[plan.Job], jobs: Sequence[plan.Job], kept: Mapping[str, Record]
) -> tuple[float, int]:
    """Seconds that the waiting jobs will take, and of how many nothing is known.

    A job takes what its method took for the same pair, else what others of it did.
    """
    by_method: dict[object, list[float]] = {}
    by_pair: dict[object, list[float]] = {}
    for job in jobs:
        if "result" in kept.get(job.name, {}):
            took = seconds(kept[job.name]["result"])
            by_method.setdefault((job.pair, job.method), []).append(took)
            by_pair.setdefault(job.pair, []).append(took)
    known = [
        by_method.get((job.pair, job.method)) or by_pair.get(job.pair)
        for job in waiting
    ]
    total = sum(statistics.fmean(took) for took in known if took)
    return total, sum(took is None for took in known)
