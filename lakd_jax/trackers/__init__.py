"""Trackers by name: where the metrics of a run go beside metrics.jsonl."""

import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import sys

from lakd_jax import fields
from lakd_jax.trackers import tracker

DEFAULT = ("tensorboard",)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tracker as the table has it; `built_in`: it belongs to this package."""

    cls: type[tracker.Tracker]
    built_in: bool


_TABLE: dict[str, Entry] = {}


def register(name: str, cls: type[tracker.Tracker], *, built_in: bool = False) -> None:
    """Enters a tracker; an earlier one of that name that was not built in goes.

    Raises:
      ValueError: the name is built in or not a word, or `cls` is no tracker.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"tracker {name!r}: the name must be a word in small letters")
    if name in _TABLE and _TABLE[name].built_in:
        raise ValueError(f"tracker {name!r} is built in: register another name")
    if not (isinstance(cls, type) and issubclass(cls, tracker.Tracker)):
        raise ValueError(f"tracker {name!r}: {cls!r} is no subclass of Tracker")
    _TABLE[name] = Entry(cls, built_in)


def names() -> list[str]:
    """Returns all trackers that a config can name."""
    return list(_TABLE)


def fault(name: str) -> str:
    """What is wrong with a name: no tracker has it, or its package is missing."""
    if found := fields.fault(name, names()):
        return found
    entry = _TABLE[name]
    package = entry.cls.package
    if not package or sys.modules.get(package) or importlib.util.find_spec(package):
        return ""
    wanted = f'"lakd-jax[{package}]"' if entry.built_in else package
    return (
        f"must name trackers that are installed, is {name!r}: pip install {wanted}, or "
        "leave it out"
    )


def create(name: str) -> tracker.Tracker:
    """Returns a new tracker; ValueError with the nearest name if there is none."""
    fields.check("tracker", name, names())
    return _TABLE[name].cls()


for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    for _name, _cls in getattr(_module, "TRACKERS", {}).items():
        register(_name, _cls, built_in=True)
