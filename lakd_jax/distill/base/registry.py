"""The table of methods: built-in ones and a user's own enter it in the same way.

A built-in method is declared in its file of `lakd_jax.distill`, which has a table
`METHODS` from name to class and, if the place in lists matters, a number `ORDER`.
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable
from typing import Any

from lakd_jax import fields
from lakd_jax.distill.base import method

# Ranges of options that a user's class declares without one.
_PLAIN: dict[str, fields.Check] = {
    "ce_weight": fields.at_least(0),
    "weight": fields.at_least(0),
    "warmup_epochs": fields.at_least(0),
    "temperature": fields.above(0),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method as the table has it.

    Attributes:
      cls: its class.
      options: what `distill.create` takes for it, in order.
      built_in: whether it belongs to this package.
    """

    cls: type[method.Method]
    options: tuple[fields.Option, ...]
    built_in: bool

    @property
    def block(self) -> tuple[fields.Option, ...]:
        """Returns the options that are fields of the method's block in the config."""
        return tuple(option for option in self.options if not option.source)

    def fact(self, name: str, default: Any) -> Any:
        """Returns `title`, `about` or `pairs` as this class declares it."""
        return vars(self.cls).get(name, default)


TABLE: dict[str, Entry] = {}


def enter(name: str, cls: type[method.Method], *, built_in: bool = False) -> None:
    """Enters a method; an earlier one of that name that was not built in goes.

    Raises:
      ValueError: the name is not a word or is taken, or an option has no default.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"method {name!r}: the name must be a word in small letters")
    if name in TABLE and TABLE[name].built_in:
        raise ValueError(f"method {name!r}: the config has this name already")
    owner = cls.options_class or cls
    for option in (options := _with_ranges(fields.options(owner))):
        if not isinstance(option.default, bool | int | float | str | tuple):
            raise ValueError(
                f"method {name!r}: {owner.__name__}.{option.name} needs a default for "
                f"the config's field {name}.{option.name}: write it in the class, as "
                f"in `{option.name}: float = 1.0`"
            )
    TABLE[name] = Entry(cls, options, built_in)


def _with_ranges(options: Iterable[fields.Option]) -> tuple[fields.Option, ...]:
    """Returns the options, with ranges for those declared without."""
    return tuple(
        option
        if option.check or isinstance(option.default, bool)
        else dataclasses.replace(option, check=_PLAIN.get(option.name, fields.finite))
        for option in options
    )


def discover(package: str, path: Iterable[str]) -> None:
    """Enters the built-in methods: the `METHODS` of the modules of a package.

    They come by `ORDER`; modules without it are last, in the order of their names.
    """
    names = sorted(info.name for info in pkgutil.iter_modules(path))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    modules = [module for module in modules if hasattr(module, "METHODS")]
    for module in sorted(modules, key=lambda m: getattr(m, "ORDER", float("inf"))):
        for name, cls in module.METHODS.items():
            enter(name, cls, built_in=True)


def get(name: str) -> Entry:
    """Returns the method `name`; ValueError with the nearest name if there is none."""
    fields.check("method", name, TABLE)
    return TABLE[name]


def added() -> list[str]:
    """Returns the names of the methods that are not built in."""
    return [name for name, entry in TABLE.items() if not entry.built_in]
