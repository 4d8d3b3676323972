"""Checks what a pair of networks allows a method to do.

Networks whose units pass on tokens beside a feature map (`Chain.RESUMABLE` is False)
cannot be run on from a map alone. Functions (`Chain.WHOLE`) and several teachers only
run as a whole.
"""

import contextlib

from lakd_jax import config as config_lib
from lakd_jax import distill, models
from lakd_jax.config import rules, several
from lakd_jax.interop import published

_SEVERAL = "several teachers (teachers) only run as a whole"
_FUNCTION = "which is a function (teacher_from) and runs as a whole"


@rules.reads(*rules.METHODS, "student.name", "teacher.name", "teachers")
def _heads(c: rules.Config, _: int) -> str | None:
    found = [name for name in rules.methods(c) if distill.facts(name).needs_heads]
    if found and c.teachers:
        return f"method {found[0]} applies the teacher's head, but {_SEVERAL}"
    for block in (c.student, c.teacher) if found else ():
        if not _resumable(block.name):
            return (
                f"method {found[0]} applies both networks' heads to positions of the "
                f"last map, {_lacks(block.name)}"
            )


@rules.reads(*rules.METHODS, "teacher.name", "teachers")
def _suffix(c: rules.Config, _: int) -> str | None:
    resumable = _resumable(c.teacher.name) and not c.teachers
    if not rules.needs_teacher(c) or resumable:
        return None
    why = f"but {_SEVERAL}" if c.teachers else _lacks(c.teacher.name)
    for name in sorted(rules.named(c)):
        if reason := _what_resumes(c, name):
            return f"{reason} resumes the teacher from a feature map, {why}"


@rules.reads(
    "student.name", "teacher.name", "teachers", "local.module_input", only_lakd=True
)
def _module_input(c: rules.Config, _: int) -> str | None:
    if c.teachers or _whole(c.teacher.name):
        return None  # see `_parts`
    names = {c.student.name, c.teacher.name}
    others = [name for name in sorted(names) if not _resumable(name)]
    if c.local.module_input == "teacher" and len(names) > 1 and others:
        return (
            f"local.module_input=teacher: the units of {others[0]} pass on tokens "
            "beside a map, which other networks do not; use local.module_input=student"
        )


@rules.reads("teacher.name", "teacher.views", "local.module_input", only_lakd=True)
def _stored_input(c: rules.Config, _: int) -> str | None:
    fed = c.local.module_input == "teacher" and c.teacher.views
    if fed and not _resumable(c.teacher.name):
        return (
            "teacher.views stores maps, but local.module_input=teacher feeds the "
            f"tokens of {c.teacher.name}, too: set teacher.views to 0"
        )


@rules.reads("student.name")
def _function_as_student(c: rules.Config, _: int) -> str | None:
    if _whole(c.student.name):
        return f"student.name is {c.student.name!r}, {_FUNCTION}: it cannot be trained"


@rules.reads(*rules.METHODS, "teacher.name", "teacher.init")
def _function_with_weights(c: rules.Config, _: int) -> str | None:
    if rules.needs_teacher(c) and _whole(c.teacher.name) and c.teacher.init:
        return (
            f"teacher.init is {c.teacher.init!r}, but {c.teacher.name} is a function "
            "that has its weights (teacher_from): leave teacher.init empty"
        )


@rules.reads(
    *rules.METHODS,
    "teacher.name",
    "teachers",
    "local.engine",
    "local.module_input",
    "local.granularity",
    "local.cuts",
)
def _parts(c: rules.Config, _: int) -> str | None:
    function = _whole(c.teacher.name)
    if not (function or c.teachers) or not rules.staged(c):
        return None
    why = f" {c.teacher.name}, {_FUNCTION}" if function else f"; {_SEVERAL}"
    counted = c.local.granularity == "flops" and not function  # see `cuts.modules`
    for field, uses_parts, remedy in (
        ("engine", c.local.engine != "fused", "fused"),
        ("module_input", c.local.module_input == "teacher", "student"),
        ("granularity", counted, "bytes"),
    ):
        if uses_parts:
            return (
                f"local.{field}={c.local[field]} takes parts of the teacher{why}: use "
                f"local.{field}={remedy}"
            )
    if function and "stem" in c.local.cuts:
        return (
            f"local.cuts: {c.teacher.name}, {_FUNCTION}, has nothing to compare at "
            "'stem': cut elsewhere"
        )


@rules.reads(*rules.METHODS, "teacher.name", "lakd.preact")
def _maps(c: rules.Config, _: int) -> str | None:
    if not _whole(c.teacher.name):
        return None
    network, advice = c.teacher.name, "choose another method or teacher"
    for name in rules.methods(c):
        facts = distill.facts(name)
        before = "lakd" in distill.parts(name) and c.lakd.preact
        if facts.needs_preacts or before:
            return (
                f"method {name}{' with lakd.preact' * before} compares maps before "
                f"their ReLU, which {network} does not have, {_FUNCTION}: {advice}"
            )
        reads = set(facts.teacher_reads) - {"logits"}
        maps = models.create(network, num_classes=2).stage_sizes
        if reads and not maps and not facts.staged:
            return (
                f"method {name} compares features, but {network} gives logits alone: "
                f"{advice}, or return maps (teacher_from)"
            )


@rules.reads(*rules.METHODS, "teachers", "teacher.name", "teacher.init")
def _teachers(c: rules.Config, _: int) -> str | None:
    if not c.teachers or not rules.needs_teacher(c):
        return None
    if c.teacher.init:
        return (
            f"teacher.init is {c.teacher.init!r} beside teachers: leave it empty, or "
            "make it one of them"
        )
    for i, entry in enumerate(c.teachers):
        network, init = several.parts(entry, c.teacher.name)
        field = f"teachers[{i}]"
        if not init and not _whole(network):
            return f"{field} is {entry!r}, without weights: write {network}=INIT"
        if init and _whole(network):
            return (
                f"{field} is {entry!r}, but {network} has its weights: write {network}"
            )
        if i == 0 and network != c.teacher.name:
            return (
                f"{field} is {entry!r}, of the network {network}, but teacher.name is "
                f"{c.teacher.name!r}: set it to {network}, since the features of the "
                "first are compared, or put another first"
            )
        if fault := published.other_network("teacher", network, init):
            return fault.replace("teacher.init", field).replace("teacher.name", field)


def _whole(name: str) -> bool:
    """Returns whether a network only runs as a whole."""
    return models.family(name).WHOLE


def _lacks(name: str) -> str:
    """Returns why a network cannot be run on from a map, and what to do."""
    why = f"which {name} cannot run on from: it is a function (teacher_from)"
    if not _whole(name):
        why = (
            f"but a map of {name} lacks the class token, without which the rest of the "
            "network cannot run"
        )
    return f"{why}: choose another network, or another method or option"


def _resumable(name: str) -> bool:
    """Returns whether a network can be run on from a feature map alone."""
    return models.family(name).RESUMABLE


def _what_resumes(c: rules.Config, method: str) -> str:
    """Returns what needs `Signals.teacher_suffix` of a method; "" if nothing does."""
    if method == "lakd":
        for field, value in (("task", "teacher_suffix"), ("attention", "logits")):
            if c.lakd[field] == value:
                return f"lakd.{field}={value}"
        return ""
    values = config_lib.flat(c)
    sources = distill.option_sources(method).items()
    options = {name: values[field] for name, field in sources if field in values}
    with contextlib.suppress(ValueError):  # of options that are out of range
        if distill.create(method, options).needs_suffix:
            return f"method {method}"
    return ""
