"""Which trainings a table needs, each with its command, in the order they are made."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lakd_jax import distill, errors
from lakd_jax.config import command_line, recipes

FOLDER = "folder:"

# What the harness itself sets, so that an override would not mean what it says.
_OWN = ("method", "seed", "seeds", "epochs", "baselines", "student.name")
_OWN += ("teacher.name", "teacher.init", "teacher.epochs", "teacher.lr")
_OWN += ("teacher.seed", "teacher.cache")


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Attributes:
      data: digits, cifar10, cifar100 or folder:DIR.
      pairs: (teacher, student).
      epochs: 0: as many as the recipe has.
      overrides: FIELD=VALUE of the configuration, for all runs.
      teachers: network -> finished run or file of weights, not to be trained.
      out: the table's directory.
    """

    data: str
    pairs: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    overrides: tuple[str, ...]
    teachers: Mapping[str, str]
    out: Path


@dataclasses.dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
      name: also that of its record below `out`/records.
      pair: (teacher, student); a teacher's own are (itself, itself).
      seed: None of a teacher, which all seeds share.
      command: of main.py, without what depends on `out` and the seed.
      directory: of the command; with a seed, the run's is `directory`/seedN.
      teacher: name of the job that has to be finished before; "" for none.
      init: directory of that job.
    """

    name: str
    pair: tuple[str, str]
    method: str
    seed: int | None
    command: tuple[str, ...]
    directory: Path
    teacher: str
    init: Path | None

    @property
    def run(self) -> Path:
        """Where the training leaves its result."""
        if self.seed is None:
            return self.directory
        return self.directory / f"seed{self.seed}"


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """ "A:B,C:D" -> ((A, B), (C, D)); ConfigError for anything else."""
    found = [tuple(part.split(":")) for part in text.split(",")]
    wrong = [":".join(p) for p in found if len(p) != 2 or not all(p)]
    if wrong:
        raise errors.ConfigError(
            [f"--pairs: {w!r} must be TEACHER:STUDENT" for w in wrong]
        )
    return tuple(dict.fromkeys((a, b) for a, b in found))


def methods(text: str) -> tuple[str, ...]:
    """The names in a list with commas; ConfigError for those that do not exist."""
    found, faults = tuple(dict.fromkeys(text.split(","))), []
    for name in found:
        try:
            distill.parts(name)
        except ValueError as error:
            faults.append(f"--methods: {error}")
    if faults:
        raise errors.ConfigError(faults)
    return found


def require(request: Request) -> None:
    """Raises ConfigError for overrides of what the harness sets, and odd teachers."""
    faults = [
        f"--override={override}: must be FIELD=VALUE"
        for override in request.overrides
        if "=" not in override
    ]
    faults += [
        f"--override={override}: the table sets {field} itself"
        for override in request.overrides
        if (field := override.partition("=")[0]) in _OWN
    ]
    wanted = {teacher for teacher, _ in request.pairs}
    faults += [
        f"--teacher={name}=...: no pair has the teacher {name}"
        for name in request.teachers
        if name not in wanted
    ]
    if faults:
        raise errors.ConfigError(faults)


def jobs(request: Request) -> list[Job]:
    """All trainings; a teacher stands right before the first that needs it.

    Seed by seed, so that a budget that ends early leaves fewer seeds, not fewer methods
    or pairs.
    """
    found: dict[str, Job] = {}
    for seed in request.seeds:
        for pair in request.pairs:
            for method in request.methods:
                for job in _with_teacher(request, pair, method, seed):
                    found.setdefault(job.name, job)
    return list(found.values())


def _with_teacher(
    request: Request, pair: tuple[str, str], method: str, seed: int
) -> Iterator[Job]:
    teacher, student = pair
    given, own = [], None
    if distill.facts(method).needs_teacher:
        if teacher in request.teachers:
            given = [f"teacher.init={request.teachers[teacher]}"]
        else:
            own = _teacher(request, teacher)
            yield own
    place = f"{teacher}-{student}/{method}"
    yield Job(
        name=f"{place}/seed{seed}",
        pair=pair,
        method=method,
        seed=seed,
        command=_command(request, pair, method, [*request.overrides, *given]),
        directory=request.out / "runs" / place,
        teacher=own.name if own else "",
        init=own.directory if own else None,
    )


def _teacher(request: Request, name: str) -> Job:
    place = f"teachers/{name}"
    kept = [o for o in request.overrides if not o.startswith(("student.", "teacher."))]
    return Job(
        name=place,
        pair=(name, name),
        method="none",
        seed=None,
        command=_command(request, (name, name), "none", kept),
        directory=request.out / "runs" / place,
        teacher="",
        init=None,
    )


def _command(
    request: Request, pair: tuple[str, str], method: str, overrides: Sequence[str]
) -> tuple[str, ...]:
    """main.py's arguments but the directory and the seeds."""
    if request.data == "digits":
        base = f"--config=configs/digits_lakd.py:{method}"
        fields = [f"teacher.name={pair[0]}", f"student.name={pair[1]}"]
    else:
        data = "cifar10" if request.data.startswith(FOLDER) else request.data
        base, fields = f"--config=configs/{data}.py:{','.join((*pair, method))}", []
    if request.data.startswith(FOLDER):
        fields.append(f"data.source={request.data}")
    config, _, _ = command_line.parse([base, *map(_override, fields)])
    shorter = recipes.shortened(config, request.epochs or config.epochs)
    fields += [f"{field}={_literal(value)}" for field, value in shorter.items()]
    fields += [*overrides, "baselines=()"]
    return (base, *map(_override, fields))


def _override(field: str) -> str:
    return f"--config.{field}"


def _literal(value: object) -> str:
    # Without the digits that a division leaves behind.
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))},)"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def command(group: Sequence[Job]) -> list[str]:
    """main.py's arguments for jobs that differ by their seed alone."""
    first = group[0]
    fields = [*first.command, f"--workdir={first.directory}"]
    if first.init:
        fields.append(_override(f"teacher.init={first.init}"))
    if first.seed is not None:
        seeds = ", ".join(str(job.seed) for job in group)
        fields.append(_override(f"seeds=({seeds},)"))
    return fields


def groups(waiting: Sequence[Job], *, together: bool) -> list[list[Job]]:
    """Jobs that one process trains: alone, or all seeds of a pair and method.

    Args:
      together: whether the device trains several seeds in one program.
    """
    found: dict[object, list[Job]] = {}
    for job in waiting:
        found.setdefault(job.directory if together else job.name, []).append(job)
    return list(found.values())
