"""The configuration: a tree of values, made from what `blocks` declares.

Files in `configs/` start from `default()` and change what they need. A command
checks the tree and then resolves it (`lakd_jax.config.resolved`): nothing below the
commands sees a ConfigDict. A tuple that is empty means "not given" where the field's
meaning says so.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_collections

ConfigDict = ml_collections.ConfigDict


def default() -> ConfigDict:
    """Returns every field with its default: LAKD under the usual CIFAR protocol."""
    from lakd_jax.config import listing  # not above: it imports JAX

    c = ConfigDict()
    for block in listing.every():
        *above, name = block.name.split(".")
        values = ConfigDict({option.name: option.default for option in block.options})
        if name:
            (c[above[0]] if above else c)[name] = values
        else:
            c.update(values)
    return c


def with_pair(config: ConfigDict, arg: str) -> ConfigDict:
    """Returns `config` with "TEACHER,STUDENT,METHOD" set; empty parts change nothing.

    Raises:
      ValueError: more than three parts.
    """
    parts = arg.split(",") if arg else []
    if len(parts) > 3:
        raise ValueError(f"expected TEACHER,STUDENT,METHOD, got {arg!r}")
    fields = ("teacher.name", "student.name", "method")
    given = {f: p.strip() for f, p in zip(fields, parts, strict=False) if p.strip()}
    return changed(config, given)


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns plain nested dictionaries and lists, as they are written to JSON."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """Returns the config of which `to_dict` made `values`, such as a config.json.

    Fields that did not exist then have their defaults.

    Raises:
      ValueError: naming fields that do not exist now.
    """
    config = default()
    fields, given = flat(config), flat(ConfigDict(values))
    unknown = ", ".join(sorted(given.keys() - fields.keys()))
    if unknown:
        raise ValueError(
            f"fields that this version does not know: {unknown}; a method of your own "
            "must be registered first"
        )
    return changed(
        config,
        {f: tuple(v) if type(fields[f]) is tuple else v for f, v in given.items()},
    )


def digest(values: dict[str, Any]) -> str:
    """Returns twelve hex digits that change with any of `values`, plain ones."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flat(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"data.pad": 4, ...}` with every field that is not a block."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def changed(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """Returns a copy in which each `{"block.field": value}` is set."""
    c = copy.deepcopy(config)
    c.update_from_flattened_dict(fields)
    return c
