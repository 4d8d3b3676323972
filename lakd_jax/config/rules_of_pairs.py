"""Checks what a pair of networks allows a method to do.

Networks whose units pass on tokens beside a feature map (`Chain.RESUMABLE` is False)
cannot be run on from a map alone.
"""

import contextlib

from lakd_jax import config as config_lib
from lakd_jax import distill, models
from lakd_jax.config import rules

# Why a network that is not `RESUMABLE` cannot do something.
_LACKS = (
    "but a map of {} lacks the class token, without which the rest of the network "
    "cannot run: choose another network, or another method or option"
)


@rules.reads(*rules.METHODS, "student.name", "teacher.name")
def _heads(c: rules.Config, _: int) -> str | None:
    found = [name for name in rules.methods(c) if distill.facts(name).needs_heads]
    for block in (c.student, c.teacher) if found else ():
        if not _resumable(block.name):
            return (
                f"method {found[0]} applies both networks' heads to positions of the "
                f"last map, {_LACKS.format(block.name)}"
            )


@rules.reads(*rules.METHODS, "teacher.name")
def _suffix(c: rules.Config, _: int) -> str | None:
    if not rules.needs_teacher(c) or _resumable(c.teacher.name):
        return None
    for name in sorted(rules.named(c)):
        if reason := _what_resumes(c, name):
            return (
                f"{reason} resumes the teacher from a feature map, "
                f"{_LACKS.format(c.teacher.name)}"
            )


@rules.reads("student.name", "teacher.name", "local.module_input", only_lakd=True)
def _module_input(c: rules.Config, _: int) -> str | None:
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
