"""Options, each declared once by the class that reads it: default, meaning, range.

A class, a frozen dataclass or a Linen module, declares an option as

    alpha: float = fields.field(1.0, "weight of the target class", fields.at_least(0))

and `options` lists what a class and its bases declare. The blocks of the config, the
checks, docs/configuration.md and the command line are derived from that list.
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

Check = Callable[[Any], str]  # the fault of a value, or "" if there is none

_KEY = "lakd_jax"  # of the metadata of a dataclass field
MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Option:
    """One option as `options` reports it.

    Attributes:
      name: of the attribute.
      default: its default; `MISSING` if there is none.
      kind: its annotation.
      doc: what it means, as docs/configuration.md has it; may be "".
      check: its range; None for none.
      source: the field of the config that it is read from, for example
        "kd.temperature"; "" if it is a field of its owner's block.
    """

    name: str
    default: Any
    kind: Any
    doc: str = ""
    check: Check | None = None
    source: str = ""


def field(
    default: Any = MISSING, doc: str = "", check: Check | None = None, source: str = ""
) -> Any:
    """Declares an option in the body of a dataclass or a Linen module.

    A class may declare an option of its base again, which moves it to that place in
    the order; it keeps the base's meaning and range unless new ones are given. A plain
    new default, `alpha: float = 2.0`, changes only the default.

    Args:
      default: without it, a subclass has to give one.
      doc: the meaning, for docs/configuration.md.
      check: the range.
      source: the field of the config that the value comes from, if that belongs to
        another block.

    Returns:
      A `dataclasses.Field`.
    """
    declared = {"doc": doc, "check": check, "source": source}
    given = {k: v for k, v in declared.items() if v}
    return dataclasses.field(default=default, metadata={_KEY: given})


def options(owner: type) -> tuple[Option, ...]:
    """Returns the options of a class, its own and its bases', in order."""
    known: Any = {f.name: f for f in dataclasses.fields(owner)}
    if "parent" in known:  # a Linen module, which has these two by itself
        del known["parent"], known["name"]
    found: dict[str, dict[str, Any]] = {}
    for base in reversed(owner.__mro__):
        own = vars(base).get("__dataclass_fields__", {})
        for name in inspect.get_annotations(base):
            if name not in own:
                continue
            declared = own[name].metadata.get(_KEY)
            before = found.get(name, {})
            if declared is not None:
                found.pop(name, None)
            found[name] = before | (declared or {})
    return tuple(
        Option(name, known[name].default, known[name].type, **declared)
        for name, declared in found.items()
        if name in known
    )


def require(owner: Any, prefix: str = "") -> None:
    """Raises ValueError for the first option of an instance that is out of range.

    Args:
      owner: an instance of a class with options.
      prefix: what the message has before the option's name.
    """
    for option in options(type(owner)):
        fault = option.check(getattr(owner, option.name)) if option.check else ""
        if fault:
            raise ValueError(f"{prefix}{option.name} {fault}")


# ---------------------------------------------------------------------------- names


def fault(value: object, valid: Iterable[str]) -> str:
    """What is wrong with a value that is not in `valid`; "" if it is.

    For example "is 'kdd'; did you mean 'kd'? It must be one of none, kd, lakd".
    """
    names = list(valid)
    if value in names:
        return ""
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"did you mean {near[0]!r}? It" if near else "it"
    return f"is {value!r}; {hint} must be one of {', '.join(names)}"


def check(field: str, value: object, valid: Iterable[str]) -> None:
    """Raises ValueError if `value` is not in `valid`, with the nearest name.

    Args:
      field: what the message calls the value, such as `lakd.attention`.
      value: what was given.
      valid: all names that are allowed.
    """
    if found := fault(value, valid):
        raise ValueError(f"{field} {found}")


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Returns the line for a field that does not exist, with the nearest that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    if not near:  # the block may be right and the leaf far off, or left out
        near = [k for k in known if k.split(".")[-1] == name.split(".")[-1]][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name} is not a field of the configuration{hint}"


# --------------------------------------------------------------------------- ranges


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


def between(low: float, high: float) -> Check:
    """Numbers from `low` to `high`, both included."""
    fault = f"must be from {_number(low)} to {_number(high)}, is "
    return lambda v: "" if low <= v <= high else fault + _number(v)


def inside(low: float, high: float) -> Check:
    """Numbers between `low` and `high`, neither included."""
    fault = f"must be between {_number(low)} and {_number(high)}, is "
    return lambda v: "" if low < v < high else fault + _number(v)


def finite(value: Any) -> str:
    """Anything but infinities and NaN."""
    fine = not isinstance(value, float) or math.isfinite(value)
    return "" if fine else f"must be finite, is {value:g}"


def whole(low: int, high: float = math.inf) -> Check:
    """Whole numbers from `low` to `high`, as entries of a tuple may be floats."""
    limits = at_least(low) if high == math.inf else between(low, high)

    def whole_number(value: float) -> str:
        if fault := limits(value):
            return fault
        return "" if isinstance(value, int) else f"must be whole numbers, is {value:g}"

    return whole_number


def one_of(names: Iterable[str]) -> Check:
    """One of `names`; the nearest is suggested."""
    names = list(names)
    return lambda value: fault(value, names)


def each(check: Check) -> Check:
    """Every entry of a tuple passes `check`."""
    return lambda values: next(filter(None, map(check, values)), "")


def some(check: Check) -> Check:
    """At least one entry, and every one passes `check`."""
    every = each(check)
    return lambda values: every(values) if values else "must not be empty"


def channels(check: Check, *, empty: bool) -> Check:
    """Three numbers, one per colour channel, or none where `empty` allows it."""

    def length(values: tuple) -> str:
        if len(values) == 3 or (empty and not values):
            return each(check)(values)
        return f"must have 3 entries, one per channel, has {len(values)}"

    return length


def shares(values: tuple) -> str:
    """Two shares, the smaller first and above 0."""
    if len(values) == 2 and 0 < values[0] <= values[1] <= 1:
        return ""
    return f"must be (least, most) with 0 < least <= most <= 1, is {values!r}"


def _number(value: float) -> str:
    return f"{value:.12g}"
