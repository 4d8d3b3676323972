"""Distillation methods by name.

A method is a Linen module with the class facts `local` (is the student cut for
it), `needs_teacher`, `needs_uncut` and `needs_suffix` (which `Signals` it reads).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lakd_jax import choices
from lakd_jax.distill import afd, kd, lakd, method, rtk

METHODS: dict[str, type[method.Method]] = {
    "none": kd.Plain,
    "kd": kd.KD,
    "lakd": lakd.LAKD,
    "afd": afd.AFD,
    "rtk": rtk.RTK,
}

# The methods whose options are an object of their own.
_OPTIONS: dict[str, Any] = {"lakd": lakd.Options, "rtk": rtk.Options}


def names() -> list[str]:
    """All methods; `none` is plain training without a teacher."""
    return list(METHODS)


def option_names(name: str) -> list[str]:
    """The options that `create` takes for a method.

    Raises ValueError for an unknown method, with the nearest name.
    """
    choices.check("method", name, names())
    owner = _OPTIONS.get(name, METHODS[name])
    own = [f.name for f in dataclasses.fields(owner)]
    return [n for n in own if n not in ("parent", "name")]


def create(name: str, options: Mapping[str, Any]) -> method.Method:
    """The method `name`; its parameters come from `init` with `Signals`.

    Args:
      name: one of `names()`.
      options: by the names of `option_names(name)`; LAKD's may be left out, where
        `lakd.Options` has defaults.

    Raises:
      ValueError: unknown method or option, or a value that is not allowed.
      TypeError: an option of a method other than LAKD is missing.
    """
    for option in options:
        choices.check(f"an option of method {name}", option, option_names(name))
    choices.check("method", name, names())
    make: Any = METHODS[name]
    if name in _OPTIONS:
        return make(_OPTIONS[name](**options))
    return make(**options)
