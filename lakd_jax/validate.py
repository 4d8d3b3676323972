"""Checks a configuration before any data or device work, all faults at once."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import distill, errors, models
from lakd_jax.local import cuts

Check = Callable[[Any], str]  # the fault, or "" if there is none


def at_least(low: float) -> Check:
    """Numbers from `low` on."""
    return lambda v: "" if v >= low else f"must be at least {low:g}, is {v:g}"


def above(low: float) -> Check:
    """Numbers above `low`."""
    return lambda v: "" if v > low else f"must be above {low:g}, is {v:g}"


def between(low: float, high: float) -> Check:
    """Numbers from `low` to `high`, both included."""
    fault = f"must be from {low:g} to {high:g}, is "
    return lambda v: "" if low <= v <= high else f"{fault}{v:g}"


def one_of(names: Iterable[str]) -> Check:
    """One of `names`; the nearest is suggested."""
    names = list(names)

    def check(value: str) -> str:
        if value in names:
            return ""
        near = difflib.get_close_matches(value, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"is {value!r}; {hint}It must be one of {', '.join(names)}"

    return check


def each(check: Check) -> Check:
    """Every entry of a tuple passes `check`."""
    return lambda values: next(filter(None, map(check, values)), "")


def channels(check: Check, *, empty: bool) -> Check:
    """Three numbers, one a colour channel, or none where `empty` allows it."""

    def length(values: tuple) -> str:
        if len(values) == 3 or (empty and not values):
            return each(check)(values)
        return f"must have 3 entries, one a channel, has {len(values)}"

    return length


def _ranges() -> dict[str, Check]:
    """Field name -> check of its value, for every field that has a range."""
    network = one_of(models.names())
    method = one_of(distill.names())
    shortcut = one_of(("projection", "identity"))
    weight = at_least(0)
    return {
        "method": method,
        "baselines": each(method),
        "epochs": at_least(1),
        "batch_size": at_least(1),
        "eval_batch_size": at_least(1),
        "dtype": one_of(("float32", "bfloat16")),
        "log_every": at_least(1),
        "eval_every": at_least(1),
        "steps_per_dispatch": at_least(0),
        "seed": at_least(0),
        "data.image_size": at_least(0),
        "data.minival": between(0, 0.5),
        "data.mean": channels(between(0, 1), empty=False),
        "data.std": channels(above(0), empty=False),
        "data.pad": at_least(0),
        "student.name": network,
        "student.shortcut": shortcut,
        "teacher.name": network,
        "teacher.shortcut": shortcut,
        "teacher.mean": channels(between(0, 1), empty=True),
        "teacher.std": channels(above(0), empty=True),
        "teacher.epochs": at_least(0),
        "teacher.seed": at_least(0),
        "teacher.floor": between(0, 1),
        "optim.lr": above(0),
        "optim.momentum": between(0, 1),
        "optim.weight_decay": at_least(0),
        "optim.schedule": one_of(("step", "cosine", "constant")),
        "optim.milestones": each(above(0)),
        "optim.decay": between(0, 1),
        "optim.warmup_epochs": at_least(0),
        "optim.clip_norm": at_least(0),
        "kd.ce_weight": weight,
        "kd.kd_weight": weight,
        "kd.temperature": above(0),
        "lakd.preset": one_of(("default", "literal")),
        "lakd.head_weight": weight,
        "lakd.attention_weight": weight,
        "lakd.feature_weight": weight,
        "lakd.alpha": between(0, 1),
        "lakd.beta": weight,
        "lakd.att_scale": weight,
        "lakd.aux_weight": weight,
        "lakd.head_loss": one_of(("ce", "ce+kd")),
        "lakd.attention": one_of(("weight", "map", "logits", "inside")),
        "lakd.power": one_of(("2", "1", "softmax")),
        "lakd.window": at_least(0),
        "lakd.stride": at_least(1),
        "lakd.f_sum": one_of(("abs", "signed", "square")),
        "lakd.normalise": one_of(("mean", "l2", "max", "sigmoid", "none")),
        "lakd.a": weight,
        "lakd.b": weight,
        "lakd.task": one_of(("last", "aux_heads", "teacher_suffix")),
        "lakd.reduction": one_of(("mean", "per_sample_sum")),
        "lakd.adapter": one_of(("always", "shape")),
        "local.granularity": one_of(("stage", "block", "none", "list")),
        "local.cut_scale": between(0, 1),
        "local.module_input": one_of(("student", "teacher")),
        "local.module_start_epochs": each(at_least(0)),
        "checkpoint.every_steps": at_least(0),
        "checkpoint.keep": at_least(1),
    }


def problems(config: config_lib.ConfigDict, devices: int) -> list[str]:
    """Every fault found, each a line that names the field; empty if none.

    Args:
      config: as given by the user, not yet resolved.
      devices: how many the batch will be split over.
    """
    found = _structure(config)
    if found:
        return found
    values = config_lib.flat(config)
    for field, check in _ranges().items():
        fault = check(values[field])
        if fault:
            found.append(f"{field} {fault}")
    return found or _relations(config, devices)


def require(config: config_lib.ConfigDict, devices: int) -> None:
    """Raises `errors.ConfigError` with all of `problems`, if there are any."""
    found = problems(config, devices)
    if found:
        raise errors.ConfigError(found)


def unknown_field(name: str, known: Iterable[str]) -> str:
    """The line for a field that does not exist, with the nearest that does."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    if not near:  # the block may be right and the leaf far off, or left out
        near = [k for k in known if k.split(".")[-1] == name.split(".")[-1]][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name} is not a field of the configuration{hint}"


def _structure(config: config_lib.ConfigDict) -> list[str]:
    """Unknown or missing fields and wrong types, against the defaults."""
    known, given = config_lib.flat(config_lib.default()), config_lib.flat(config)
    found = [unknown_field(k, known) for k in given if k not in known]
    found += [f"{k} is missing from the configuration" for k in known if k not in given]
    for key in known.keys() & given.keys():
        want, have = type(known[key]), type(given[key])
        if want is not have and not (want is float and have is int):
            found.append(
                f"{key} must be {want.__name__}, is {have.__name__} {given[key]!r}"
            )
    return sorted(found)


def _relations(config: config_lib.ConfigDict, devices: int) -> list[str]:
    """Faults between fields that are each fine alone."""
    c, found = config, []
    for field in ("batch_size", "eval_batch_size"):
        if c[field] % devices:
            found.append(
                f"{field} is {c[field]}, which {devices} devices cannot share "
                f"equally; use a multiple of {devices}"
            )
    if c.optim.warmup_epochs > c.epochs:
        found.append(
            f"optim.warmup_epochs is {c.optim.warmup_epochs:g}, more than epochs "
            f"({c.epochs})"
        )
    if c.kd.ce_weight == 0 and c.kd.kd_weight == 0:
        found.append("kd.ce_weight and kd.kd_weight are both 0: nothing is learnt")
    if c.method == "lakd":
        found += _lakd_relations(c)
    return found


def _lakd_relations(c: config_lib.ConfigDict) -> list[str]:
    found = []
    if c.lakd.preset == "default":
        weights = ("head_weight", "attention_weight", "feature_weight")
        if not any(c.lakd[w] for w in weights):
            found.append(
                "lakd.head_weight, attention_weight, feature_weight are all 0: "
                "nothing is learnt"
            )
    if c.lakd.a == 0 and c.lakd.b == 0:
        found.append("lakd.a and lakd.b are both 0: the mask would be empty")
    if c.lakd.preact and c.local.granularity not in ("stage", "none"):
        found.append("lakd.preact needs local.granularity=stage or none")
    if bool(c.local.cuts) != (c.local.granularity == "list"):
        found.append("local.cuts goes with local.granularity=list, and only with it")
    try:
        student = models.create(c.student.name, num_classes=2)
        teacher = models.create(c.teacher.name, num_classes=2)
        partition = cuts.modules(student, teacher, c.local.granularity, c.local.cuts)
    except ValueError as e:
        return [*found, str(e)]
    starts = c.local.module_start_epochs
    if starts and len(starts) != len(partition.student_joints):
        found.append(
            f"local.module_start_epochs has {len(starts)} entries, the student "
            f"{len(partition.student_joints)} modules"
        )
    return found
