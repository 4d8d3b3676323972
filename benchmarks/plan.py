"""The trainings that a table needs, each with its command, in the order of training."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lakd_jax import distill, errors
from lakd_jax.config import command_line, recipes

FOLDER = "folder:"

# What the table itself sets; an override of it would be lost.
_OWN = ("method", "seed", "seeds", "epochs", "baselines", "student.name")
_OWN += ("teacher.name", "teacher.init", "teacher.epochs", "teacher.lr")
_OWN += ("teacher.seed", "teacher.cache")

# Titles may contain "=": the first one that a METHOD follows ends the title.
_ARM = re.compile(r"(?P<title>\w[^/]*?)=(?P<spec>[^=:,\s]+(:.*)?)")
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside of brackets


@dataclasses.dataclass(frozen=True)
class Arm:
    """A row of a table: a method with fields of its own.

    Attributes:
      name: of its directories and records.
      title: of its row.
      overrides: FIELD=VALUE of the configuration.
    """

    name: str
    title: str
    method: str
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A table as the command line requests it.

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
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    epochs: int
    overrides: tuple[str, ...]
    teachers: Mapping[str, str]
    out: Path


@dataclasses.dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
      name: of its record.
      label: for people; jobs that differ by their seed alone have the same.
      pair: (teacher, student); a teacher's is (itself, itself).
      arm: name of the arm; "" for a teacher.
      seed: None of a teacher, which all seeds share.
      settings: main.py's arguments as they are recorded, the same on every machine.
      argv: all of main.py's arguments.
      directory: of the run.
      teacher: name of the job that has to be finished before; "" for none.
    """

    name: str
    label: str
    pair: tuple[str, str]
    arm: str
    method: str
    seed: int | None
    settings: tuple[str, ...]
    argv: tuple[str, ...]
    directory: Path
    teacher: str = ""


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parses "A:B,C:D" as ((A, B), (C, D)); ConfigError for anything else."""
    found = [tuple(part.split(":")) for part in text.split(",")]
    wrong = [":".join(p) for p in found if len(p) != 2 or not all(p)]
    if wrong:
        raise errors.ConfigError(
            [f"--pairs: {w!r} must be TEACHER:STUDENT" for w in wrong]
        )
    return tuple(dict.fromkeys((a, b) for a, b in found))


def methods(text: str) -> tuple[Arm, ...]:
    """Returns an arm per name in a list with commas; ConfigError if one is unknown."""
    names = tuple(dict.fromkeys(text.split(",")))
    _require_known("--methods", names)
    return tuple(Arm(name, distill.title(name), name) for name in names)


def arm(text: str) -> Arm:
    """Parses "TITLE=METHOD" or "TITLE=METHOD:FIELD=VALUE,..."."""
    found = _ARM.fullmatch(text)
    if found is None:
        raise errors.ConfigError(
            [f"--arm={text}: must be TITLE=METHOD[:FIELD=VALUE,...], no / in TITLE"]
        )
    parsed = arm_of(found["title"], found["spec"])
    _require_known(f"--arm={text}", [parsed.method])
    return parsed


def arm_of(title: str, spec: str) -> Arm:
    """Returns an arm, given its title and "METHOD" or "METHOD:FIELD=VALUE,..."."""
    method, _, fields = spec.partition(":")
    overrides = tuple(_COMMA.split(fields)) if fields else ()
    return Arm(title.replace(" ", "_"), title, method, overrides)


def _require_known(flag: str, names: Sequence[str]) -> None:
    faults = []
    for name in names:
        try:
            distill.parts(name)
        except ValueError as error:
            faults.append(f"{flag}: {error}")
    if faults:
        raise errors.ConfigError(faults)


def require(request: Request) -> None:
    """Raises ConfigError for overrides of what the table sets, and odd teachers."""
    given = [(f"--override={override}", override) for override in request.overrides]
    given += [(f"--arm={a.title}: {o}", o) for a in request.arms for o in a.overrides]
    faults = [f"{flag}: must be FIELD=VALUE" for flag, o in given if "=" not in o]
    faults += [
        f"{flag}: the table sets {field} itself"
        for flag, override in given
        if (field := override.partition("=")[0]) in _OWN
    ]
    names = [arm.name for arm in request.arms]
    faults += [
        f"--arm={name}: two arms have this name"
        for name in sorted(set(names))
        if names.count(name) > 1
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
    """Returns all trainings; a teacher stands right before the first that needs it.

    Seed by seed, so that a budget that ends early leaves fewer seeds, not fewer arms
    or pairs.
    """
    found: dict[str, Job] = {}
    for seed in request.seeds:
        for pair in request.pairs:
            for arm in request.arms:
                for job in _with_teacher(request, pair, arm, seed):
                    found.setdefault(job.name, job)
    return list(found.values())


def _with_teacher(
    request: Request, pair: tuple[str, str], arm: Arm, seed: int
) -> Iterator[Job]:
    teacher, student = pair
    given, needed = [], None
    if distill.facts(arm.method).needs_teacher:
        if teacher in request.teachers:
            given = [f"teacher.init={request.teachers[teacher]}"]
        else:
            needed = _teacher(request, teacher)
            yield needed
    overrides = [*request.overrides, *arm.overrides, *given]
    settings = _settings(request, pair, arm.method, overrides)
    name = f"{teacher}-{student}/{arm.name}/seed{seed}"
    directory = request.out / "runs" / name
    argv = [*settings, f"--workdir={directory}"]
    if needed:
        argv.append(override(f"teacher.init={needed.directory}"))
    yield Job(
        name=name,
        label=f"{teacher} -> {student}, {arm.name}",
        pair=pair,
        arm=arm.name,
        method=arm.method,
        seed=seed,
        settings=settings,
        argv=(*argv, override(f"seed={seed}")),
        directory=directory,
        teacher=needed.name if needed else "",
    )


def _teacher(request: Request, name: str) -> Job:
    kept = [o for o in request.overrides if not o.startswith(("student.", "teacher."))]
    settings = _settings(request, (name, name), "none", kept)
    directory = request.out / "runs" / "teachers" / name
    return Job(
        name=f"teachers/{name}",
        label=f"{name}, teacher",
        pair=(name, name),
        arm="",
        method="none",
        seed=None,
        settings=settings,
        argv=(*settings, f"--workdir={directory}"),
        directory=directory,
    )


def _settings(
    request: Request, pair: tuple[str, str], method: str, overrides: Sequence[str]
) -> tuple[str, ...]:
    """Returns main.py's arguments without what depends on `out` and the seed."""
    if request.data == "digits":
        base = f"--config=configs/digits_lakd.py:{method}"
        fields = [f"teacher.name={pair[0]}", f"student.name={pair[1]}"]
    else:
        data = "cifar10" if request.data.startswith(FOLDER) else request.data
        base, fields = f"--config=configs/{data}.py:{','.join((*pair, method))}", []
    if request.data.startswith(FOLDER):
        fields.append(f"data.source={request.data}")
    config, _, _ = command_line.parse([base, *map(override, fields)])
    shorter = recipes.shortened(config, request.epochs or config.epochs)
    fields += [f"{field}={_literal(value)}" for field, value in shorter.items()]
    fields += [*overrides, "baselines=()"]
    return (base, *map(override, fields))


def override(field: str) -> str:
    """Returns FIELD=VALUE as an argument of main.py."""
    return f"--config.{field}"


def _literal(value: object) -> str:
    # Without the digits that a division leaves behind.
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))},)"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
