"""Checks relations between config fields about the optimiser."""

from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.config import optimiser, rules

_DEFAULTS = optimiser.Optim()

# The fields that only some optimisers have, and which.
_ADAMS = ("adamw", "adam", "lamb")
_OWNERS = {
    "momentum": ("sgd",),
    "nesterov": ("sgd",),
    "dot_delta": ("sgd",),
    "beta1": (*_ADAMS, "lion"),
    "beta2": (*_ADAMS, "lion"),
    "eps": _ADAMS,
}


def _default(field: str) -> Any:
    return getattr(_DEFAULTS, field)


def _is_default(c: rules.Config, field: str) -> bool:
    return c.optim[field] == _default(field)


@rules.reads("optim.name", *(f"optim.{field}" for field in _OWNERS))
def _owners(c: rules.Config, _: int) -> str | None:
    for field, owners in _OWNERS.items():
        if c.optim.name not in owners and not _is_default(c, field):
            return (
                f"optim.{field} is {c.optim[field]}, which optim.name={c.optim.name} "
                f"does not have, only {', '.join(owners)}: set it to "
                f"{_default(field)}"
            )


@rules.reads("optim.schedule", "optim.lr_floor", "optim.cosine_from")
def _of_cosine(c: rules.Config, _: int) -> str | None:
    for field in ("lr_floor", "cosine_from"):
        if c.optim.schedule != "cosine" and not _is_default(c, field):
            return (
                f"optim.{field} is {c.optim[field]}, but only optim.schedule=cosine "
                f"has it, not {c.optim.schedule}"
            )


@rules.reads("optim.lr", "optim.lr_floor", "optim.lr_start", "teacher.lr")
def _rates(c: rules.Config, _: int) -> str | None:
    highest = min(c.optim.lr, c.teacher.lr or c.optim.lr)
    name = "optim.lr" if highest == c.optim.lr else "teacher.lr"
    for field in ("lr_floor", "lr_start"):
        if c.optim[field] > highest:
            return (
                f"optim.{field} is {c.optim[field]:g}, more than {name} ({highest:g})"
            )


@rules.reads("optim.lr_start", "optim.warmup_epochs")
def _start(c: rules.Config, _: int) -> str | None:
    if c.optim.lr_start and not c.optim.warmup_epochs:
        return "optim.lr_start begins a warm-up: set optim.warmup_epochs, or it to 0"


@rules.reads("batch_size", "optim.accumulate")
def _accumulate(c: rules.Config, devices: int) -> str | None:
    parts = c.optim.accumulate
    if c.batch_size % devices or c.batch_size % (parts * devices) == 0:
        return None
    shared = f" for {devices} devices" if devices > 1 else ""
    return (
        f"optim.accumulate is {parts}, but batch_size ({c.batch_size}) does not divide "
        f"into as many parts{shared}; use a multiple of {parts * devices}"
    )


@rules.reads("optim.ema", "optim.ema_warmup", "optim.ema_used")
def _ema(c: rules.Config, _: int) -> str | None:
    for field in ("ema_warmup", "ema_used"):
        if not c.optim.ema and not _is_default(c, field):
            return (
                f"optim.{field} is {c.optim[field]}, but there is no average: set "
                "optim.ema, such as 0.9999"
            )


_NOT_OF_HME = ("name", "decay_mask", "ema")


@rules.reads("student.name", *(f"optim.{field}" for field in _NOT_OF_HME))
def _hme(c: rules.Config, _: int) -> str | None:
    for field in _NOT_OF_HME:
        if c.student.name == "hme" and not _is_default(c, field):
            return (
                f"optim.{field} is {c.optim[field]}, but student.name=hme has its own "
                f"optimisers: set it to {_default(field)}"
            )


# The fields of built-in methods that shift the momenta of some of their losses.
_SHIFTS = tuple(
    m.shift for name in distill.names() for m in distill.facts(name).momenta
)


def _shifts(c: rules.Config) -> dict[str, float]:
    """Returns, by field, what is added to momenta; {} if nothing is to any."""
    values = config_lib.flat(c)
    facts = map(distill.facts, rules.methods(c))
    found = {m.shift: values[m.shift] for one in facts for m in one.momenta}
    return found if any(found.values()) else {}


@rules.reads(*rules.METHODS, *_SHIFTS, "optim.momentum")
def _shifted_momenta(c: rules.Config, _: int) -> str | None:
    for field, shift in _shifts(c).items():
        momentum = c.optim.momentum + shift
        if not 0 <= momentum < 1:
            return (
                f"{field} is {shift:g}: with optim.momentum={c.optim.momentum:g} the "
                f"momentum {momentum:g} must be at least 0 and below 1"
            )


@rules.reads(
    *rules.METHODS,
    *_SHIFTS,
    "optim.name",
    "optim.nesterov",
    "optim.clip_norm",
    "student.name",
)
def _shifted(c: rules.Config, _: int) -> str | None:
    shifts = _shifts(c)
    refused = {f"optim.name={c.optim.name} has none": c.optim.name != "sgd"}
    found = [reason for reason, holds in (refused | _unsplit(c)).items() if holds]
    if shifts and found:
        return (
            f"{', '.join(shifts)} are for losses with a momentum each, but {found[0]}: "
            "set them to 0"
        )


def _unsplit(c: rules.Config) -> dict[str, bool]:
    """Returns reasons why losses cannot have a momentum each, and whether they hold."""
    return {
        "student.name=hme has its own optimisers": c.student.name == "hme",
        "it does not support optim.nesterov": c.optim.nesterov,
        "it does not support optim.clip_norm": c.optim.clip_norm > 0,
    }


@rules.reads("optim.dot_delta", "optim.momentum")
def _dot_momenta(c: rules.Config, _: int) -> str | None:
    delta, momentum = c.optim.dot_delta, c.optim.momentum
    if delta and (delta > momentum or momentum + delta >= 1):
        return (
            f"optim.dot_delta is {delta:g}: the momenta {momentum - delta:g} and "
            f"{momentum + delta:g} must be at least 0 and below 1"
        )


@rules.reads(
    *rules.METHODS,
    "optim.dot_delta",
    "optim.nesterov",
    "optim.clip_norm",
    "student.name",
    "local.engine",
    "local.cut_scale",
    "local.cut_end",
    *_SHIFTS,
)
def _dot(c: rules.Config, _: int) -> str | None:
    if not c.optim.dot_delta:
        return None
    cut = [m for m in rules.methods(c) if distill.facts(m).local]
    refused = {
        "method none has no loss but that of the labels": c.method == "none",
        f"local.engine={c.local.engine} trains modules separately": c.local.engine
        != "fused",
        f"method {''.join(cut[:1])} trains modules separately unless local.cut_scale "
        "is above 0": cut and max(c.local.cut_scale, c.local.cut_end) <= 0,
        f"{', '.join(_shifts(c))} set the momenta": bool(_shifts(c)),
    }
    found = [reason for reason, holds in (refused | _unsplit(c)).items() if holds]
    if found:
        return f"optim.dot_delta is {c.optim.dot_delta:g}, but {found[0]}: set it to 0"
