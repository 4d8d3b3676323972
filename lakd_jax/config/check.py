"""Checks a configuration before any data or device work, all faults at once."""

import difflib
import functools
import math
import operator
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import distill, errors, models, paths
from lakd_jax import fields as fields_lib
from lakd_jax.config import rules_of_runs
from lakd_jax.distill import lakd, rtk, sdd
from lakd_jax.local import cuts
from lakd_jax.models import vam

Check = Callable[[Any], str]  # the fault, or "" if there is none

SEEDS = 2**32  # of a larger one JAX would take the lower 32 bits
_WORDS = ("baselines", "local.cuts")  # tuples of names; all others hold numbers


def at_least(low: float) -> Check:
    """Finite numbers from `low` on."""
    fault = f"must be at least {low:g}, is "
    return lambda v: "" if low <= v < math.inf else fault + _number(v)


def above(low: float) -> Check:
    """Finite numbers above `low`."""
    fault = f"must be above {low:g}, is "
    return lambda v: "" if low < v < math.inf else fault + _number(v)


def below(high: float) -> Check:
    """Numbers from 0 to below `high`."""
    fault = f"must be from 0 to below {high:g}, is "
    return lambda v: "" if 0 <= v < high else fault + _number(v)


def finite(value: Any) -> str:
    """No infinity and no NaN; what is no number is fine."""
    fine = not isinstance(value, float) or math.isfinite(value)
    return "" if fine else f"must be finite, is {value:g}"


def between(low: float, high: float) -> Check:
    """Numbers from `low` to `high`, both included."""
    fault = f"must be from {_number(low)} to {_number(high)}, is "
    return lambda v: "" if low <= v <= high else fault + _number(v)


def cut_scale(value: float) -> str:
    """A share of the gradient, or -1 where the method says it."""
    return "" if value == -1 else between(0, 1)(value)


def whole_seed(value: float) -> str:
    """An entry of `seeds`; `seed` itself is whole by its type."""
    if fault := between(0, SEEDS - 1)(value):
        return fault
    return "" if isinstance(value, int) else f"must be whole numbers, is {value:g}"


def network(name: str) -> str:
    """A network that can be made."""
    try:
        models.family(name)
    except ValueError as e:
        return str(e).removeprefix("network ")
    return ""


def method_name(name: str) -> str:
    """A method, or a sum of several."""
    try:
        distill.parts(name)
    except ValueError as e:
        return str(e).removeprefix("method ")
    return ""


def source(value: str) -> str:
    """The name of a data set, or its folder or file on this machine."""
    return paths.fault(value.removeprefix("folder:").removeprefix("npz:"))


def cache(value: str) -> str:
    """A path, or a URL: JAX can keep compiled programs in a bucket."""
    return "" if "://" in value else paths.fault(value)


def _number(value: float) -> str:
    return f"{value:.12g}"


def one_of(names: Iterable[str]) -> Check:
    """One of `names`; the nearest is suggested."""
    names = list(names)
    return lambda value: fields_lib.fault(value, names)


def each(check: Check) -> Check:
    """Every entry of a tuple passes `check`."""
    return lambda values: next(filter(None, map(check, values)), "")


def shares(values: tuple) -> str:
    """Two shares, the smaller first and above 0."""
    if len(values) == 2 and 0 < values[0] <= values[1] <= 1:
        return ""
    return f"must be (least, most) with 0 < least <= most <= 1, is {values!r}"


def some(check: Check) -> Check:
    """At least one entry, and every one passes `check`."""
    every = each(check)
    return lambda values: every(values) if values else "must not be empty"


def scale(value: float) -> str:
    """Parts by side."""
    if fault := at_least(1)(value):
        return fault
    return "" if isinstance(value, int) else f"must be whole numbers, is {value:g}"


def channels(check: Check, *, empty: bool) -> Check:
    """Three numbers, one a colour channel, or none where `empty` allows it."""

    def length(values: tuple) -> str:
        if len(values) == 3 or (empty and not values):
            return each(check)(values)
        return f"must have 3 entries, one a channel, has {len(values)}"

    return length


def _ranges() -> dict[str, Check]:
    """Field name -> check of its value, for every field that has a range."""
    choice = {"lakd": lakd.CHOICES, "rtk": rtk.CHOICES}
    words = {f"{b}.{f}": one_of(v) for b, c in choice.items() for f, v in c.items()}
    parts = (
        _run_ranges(),
        _network_ranges(),
        _optim_ranges(),
        _method_ranges(),
        _block_ranges(),
        _hme_ranges(),
        _local_ranges(),
    )
    return functools.reduce(operator.or_, parts, words)


def _run_ranges() -> dict[str, Check]:
    """Of the fields in no block, and of those about data and checkpoints."""
    method = method_name
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
        "seed": between(0, SEEDS - 1),
        "seeds": each(whole_seed),
        "data.image_size": at_least(0),
        "data.minival": between(0, 0.5),
        "data.max_bad": at_least(0),
        "data.mean": channels(between(0, 1), empty=False),
        "data.std": channels(above(0), empty=False),
        "data.pad": at_least(0),
        "data.crop_scale": shares,
        "data.test_resize": at_least(1),
        "data.workers": at_least(0),
        "label_smoothing": below(1),
        "checkpoint.every_steps": at_least(0),
        "checkpoint.keep": at_least(1),
    }


def _network_ranges() -> dict[str, Check]:
    """Of student and teacher."""
    shortcut = one_of(("projection", "identity"))
    weight = at_least(0)
    return {
        "student.name": network,
        "student.shortcut": shortcut,
        "student.image_size": at_least(0),
        "student.vam.gate": one_of(vam.GATES),
        "student.vam.blocks": at_least(2),
        "student.vam.temperature": above(0),
        "student.vam.init_std": at_least(0),
        "student.vam.gamma": weight,
        "teacher.name": network,
        "teacher.shortcut": shortcut,
        "teacher.image_size": at_least(0),
        "teacher.mean": channels(between(0, 1), empty=True),
        "teacher.std": channels(above(0), empty=True),
        "teacher.epochs": at_least(0),
        "teacher.lr": at_least(0),
        "teacher.seed": between(0, SEEDS - 1),
        "teacher.floor": between(0, 1),
        "teacher.views": at_least(0),
        "teacher.views_mib": at_least(1),
    }


def _optim_ranges() -> dict[str, Check]:
    """Of the optimiser."""
    return {
        "optim.lr": above(0),
        "optim.lr_batch": at_least(0),
        "optim.momentum": between(0, 1),
        "optim.dot_delta": below(1),
        "optim.weight_decay": at_least(0),
        "optim.schedule": one_of(("step", "cosine", "constant")),
        "optim.milestones": each(above(0)),
        "optim.decay": between(0, 1),
        "optim.warmup_epochs": at_least(0),
        "optim.clip_norm": at_least(0),
    }


def _method_ranges() -> dict[str, Check]:
    """Of the methods' weights and numbers."""
    weight = at_least(0)
    return {
        "kd.ce_weight": weight,
        "kd.kd_weight": weight,
        "kd.temperature": above(0),
        "lakd.head_weight": weight,
        "lakd.attention_weight": weight,
        "lakd.feature_weight": weight,
        "lakd.alpha": between(0, 1),
        "lakd.beta": weight,
        "lakd.att_scale": weight,
        "lakd.aux_weight": weight,
        "lakd.window": at_least(0),
        "lakd.stride": at_least(1),
        "lakd.a": weight,
        "lakd.b": weight,
        "afd.qk_dim": at_least(1),
        "afd.ce_weight": weight,
        "afd.kd_weight": weight,
        "afd.beta": weight,
        "rtk.qk_dim": at_least(1),
        "rtk.ce_weight": weight,
        "rtk.kd_weight": weight,
        "rtk.beta": weight,
        "rtk.top_r": at_least(1),
    }


# Of the fields in the blocks of `config.methods`, by the name they all have.
_BLOCK_FIELDS: dict[str, Check] = {
    "p": above(0),
    **dict.fromkeys(("ce_weight", "weight", "alpha", "beta", "gamma"), at_least(0)),
    **dict.fromkeys(("distance_weight", "angle_weight", "init_weight"), at_least(0)),
    **dict.fromkeys(("warmup_epochs", "init_epochs"), at_least(0)),
    **dict.fromkeys(("dim", "k", "hint_layer"), at_least(1)),
    **dict.fromkeys(("margin", "rate"), above(0)),
    "init_variance": at_least(0.001),
    "temperature": above(0),
    "temperatures": some(above(0)),
    "temperature_min": above(0),
    "temperature_span": at_least(0),
    **dict.fromkeys(("batch_weight", "class_weight"), at_least(0)),
    **dict.fromkeys(("lambda_min", "lambda_max"), at_least(0)),
    "lambda_epochs": above(0),
    "exponent": above(0),
    "base": one_of(sdd.BASES),
    "scales": some(scale),
    "complementary": at_least(0),
    **dict.fromkeys(("kd_weight", "gkd_weight"), at_least(0)),
    "kd_warmup_epochs": at_least(0),
    "resolution": at_least(1),
    "dropout": below(1),
    "cutoff": between(0, 1),
    "decay": between(0, 1),
    "decay_epochs": each(above(0)),
    "alone_epochs": at_least(0),
    "negatives": at_least(1),
    "momentum": between(0, 1),
}


def _block_ranges() -> dict[str, Check]:
    """Of the methods with such blocks: every field but those that are on or off."""
    own = config_lib.added_blocks()
    return {
        f"{method}.{field}": _added(field) if method in own else _BLOCK_FIELDS[field]
        for method, block in config_lib.method_blocks().items()
        for field, value in block.items()
        if not isinstance(value, bool)
    }


def _added(field: str) -> Check:
    """Of a registered method: other names may mean something else there."""
    shared = ("ce_weight", "weight", "warmup_epochs", "temperature")
    return _BLOCK_FIELDS[field] if field in shared else finite


def _hme_ranges() -> dict[str, Check]:
    """Of the hierarchy of experts."""
    options = models.family("hme").OPTIONS
    return {
        "hme.layout": one_of(options["layout"]),
        "hme.base": one_of(options["base"]),
        "hme.output": one_of(("nce", "ce")),
        "hme.loss": one_of(("kway", "binary")),
        "hme.positive_weight": above(0),
        "hme.stage1_epochs": at_least(0),
        "hme.stage1_lr": above(0),
        "hme.gate_lr": above(0),
        "hme.temperature": above(0),
        "hme.stage2_lr": above(0),
    }


def _local_ranges() -> dict[str, Check]:
    """Of where and how a student is cut."""
    return {
        "local.granularity": one_of(cuts.GRANULARITIES),
        "local.cut_scale": cut_scale,
        "local.modules": at_least(0),
        "local.engine": one_of(cuts.ENGINES),
        "local.module_input": one_of(("student", "teacher")),
        "local.module_start_epochs": each(at_least(0)),
    }


_PATHS: dict[str, Check] = {
    "data.source": source,
    "data.data_dir": paths.fault,
    "student.init": paths.fault,
    "teacher.init": paths.fault,
    "teacher.cache": paths.fault,
    "compile_cache": cache,
}


def problems(
    config: config_lib.ConfigDict, devices: int, *, skip: Collection[str] = ()
) -> list[str]:
    """Every fault found, each a line that names the field; empty if none.

    Args:
      config: as given by the user, not yet resolved.
      devices: how many the batch will be split over.
      skip: fields that are known to be wrong and of which nothing is to be said.
    """
    faults = {field: "" for field in skip} | _structure(config)
    values = config_lib.flat(config)
    for field, check in (_ranges() | _PATHS).items():
        if field not in faults and (fault := check(values[field])):
            faults[field] = f"{field} {fault}"
    found = [fault for fault in faults.values() if fault]
    for fields, relation in rules_of_runs.TABLE:
        # What a relation makes of a field wrong by itself is not worth reading.
        if faults.keys().isdisjoint(fields):
            found += filter(None, [relation(config, devices)])
    return found


def require(
    config: config_lib.ConfigDict, devices: int, workdir: str | os.PathLike = ""
) -> None:
    """Raises `errors.ConfigError` with all of `problems`, if there are any.

    Args:
      config: see `problems`.
      devices: see `problems`.
      workdir: where the run is kept, "" for none; checked with the fields.
    """
    found = problems(config, devices)
    if fault := paths.fault(workdir):
        found.insert(0, f"--workdir {fault}")
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


def _structure(config: config_lib.ConfigDict) -> dict[str, str]:
    """Unknown or missing fields and wrong types, against the defaults, by field."""
    known, given = config_lib.flat(config_lib.default()), config_lib.flat(config)
    found = {k: unknown_field(k, known) for k in given if k not in known}
    for field, default in known.items():
        if field not in given:
            found[field] = f"{field} is missing from the configuration"
            if field.partition(".")[0] in config_lib.added_blocks():
                found[field] += ": call default() after registering the method"
        elif fault := _type_fault(field, default, given[field]):
            found[field] = fault
    return found


def _type_fault(field: str, default: Any, value: Any) -> str:
    want, have = type(default), type(value)
    if want is not have and not (want is float and have is int):
        return f"{field} must be {want.__name__}, is {have.__name__} {value!r}"
    if want is not tuple:
        return ""
    entry = (str,) if field in _WORDS else (int, float)
    if all(type(v) in entry for v in value):
        return ""
    return f"{field} must hold {'names' if str in entry else 'numbers'}, is {value!r}"
