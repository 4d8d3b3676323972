"""Checks a configuration before any data or device work, all faults at once."""

import os
from collections.abc import Collection
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import errors, fields, paths

# Importing the last four adds their relations to `rules.TABLE`.
from lakd_jax.config import (  # noqa: F401
    listing,
    rules,
    rules_of_augmentation,
    rules_of_optim,
    rules_of_pairs,
    rules_of_runs,
)
from lakd_jax.distill.base import registry


def problems(
    config: config_lib.ConfigDict, devices: int, *, skip: Collection[str] = ()
) -> list[str]:
    """Returns every fault, each as a line that names the field.

    Args:
      config: as given by the user, not yet resolved.
      devices: how many the batch will be split over.
      skip: fields that are known to be wrong and are not reported again.
    """
    options = listing.options()
    faults = {field: "" for field in skip} | _structure(config, options)
    values = config_lib.flat(config)
    for field, option in options.items():
        check = option.check
        if check and field not in faults and (fault := check(values[field])):
            faults[field] = f"{field} {fault}"
    found = [fault for fault in faults.values() if fault]
    for reads, relation in rules.TABLE:
        # A relation that reads a field which is wrong by itself would report it twice.
        if faults.keys().isdisjoint(reads):
            found += filter(None, [relation(config, devices)])
    return found + rules.of_methods(config, faults)


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
    if fault := paths.place_fault(workdir):
        found.insert(0, f"--workdir {fault}")
    if found:
        raise errors.ConfigError(found)


def _structure(
    config: config_lib.ConfigDict, options: dict[str, fields.Option]
) -> dict[str, str]:
    """Unknown or missing fields and wrong types, by field."""
    given, added = config_lib.flat(config), registry.added()
    found = {k: fields.unknown_field(k, options) for k in given if k not in options}
    for field, option in options.items():
        if field not in given:
            found[field] = f"{field} is missing from the configuration"
            if field.partition(".")[0] in added:
                found[field] += ": call default() after registering the method"
        elif fault := _type_fault(field, option, given[field]):
            found[field] = fault
    return found


def _type_fault(field: str, option: fields.Option, value: Any) -> str:
    want, have = type(option.default), type(value)
    if want is not have and not (want is float and have is int):
        return f"{field} must be {want.__name__}, is {have.__name__} {value!r}"
    if want is not tuple:
        return ""
    words = option.kind == tuple[str, ...]  # all other tuples hold numbers
    if all(type(v) in ((str,) if words else (int, float)) for v in value):
        return ""
    return f"{field} must hold {'names' if words else 'numbers'}, is {value!r}"
