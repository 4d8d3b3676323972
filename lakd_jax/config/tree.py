"""The configuration as one tree of values, made from what `blocks` declares.

Files in `configs/` start from `default()` and change what they need. Only the
builders in `lakd_jax.runs` and `lakd_jax.training.setup` read a config; library
functions take plain values. A tuple that is empty means "not given" where the
field's meaning says so.
"""

import copy
import hashlib
import json
from typing import Any

import ml_collections

ConfigDict = ml_collections.ConfigDict


def default() -> ConfigDict:
    """Returns every field with its default: LAKD under the usual CIFAR protocol."""
    from lakd_jax.config import blocks  # not above: it imports JAX

    c = ConfigDict()
    for block in blocks.every():
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


LITERAL = {"adapter": "shape", "normalise": "none", "head_loss": "ce"}


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy with presets and "same as" fields written out.

    `lakd.preset="literal"` pins the fields in `LITERAL`; `teacher.epochs=0` and
    `hme.stage1_epochs=0` become the student's epochs; `baselines` loses `method` and
    repetitions. Of registered methods only the blocks of those that run are kept, so
    that registering one changes no other run and no teacher's hash.
    """
    from lakd_jax.distill.base import registry

    c = copy.deepcopy(config)
    named = {part for m in (c.method, *c.baselines) for part in m.split("+")}
    with c.unlocked():
        for name in set(registry.added()) - named:
            if name in c:  # there is none for a method without options
                del c[name]
        others = dict.fromkeys(m for m in c.baselines if m != c.method)
        c.baselines = tuple(others)
        if c.lakd.preset == "literal":
            c.lakd.update(LITERAL)
        c.teacher.epochs = c.teacher.epochs or c.epochs
        c.hme.stage1_epochs = c.hme.stage1_epochs or c.epochs
    return c


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


def digest(config: ConfigDict) -> str:
    """Returns twelve hex digits that change with any field."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns `{"data.pad": 4, ...}` with every field that is not a block."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def changed(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """Returns a copy in which each `{"block.field": value}` is set."""
    c = copy.deepcopy(config)
    c.update_from_flattened_dict(fields)
    return c


def teacher_config(config: ConfigDict) -> ConfigDict:
    """Returns the config that trains the teacher: plain training of its network.

    Only what matters to the teacher is kept; student and method fields are
    reset, so that every student that needs this teacher finds the same one.
    """
    c, t = default(), config.teacher
    c.update(method="none", seed=t.seed, epochs=t.epochs)
    for name in ("batch_size", "eval_batch_size", "dtype", "log_every", "eval_every"):
        c[name] = config[name]
    c.data = copy.deepcopy(config.data)
    c.optim = copy.deepcopy(config.optim)
    c.optim.lr = t.lr or config.optim.lr
    c.optim.dot_delta = 0.0  # there is one loss only
    c.student.update(name=t.name, shortcut=t.shortcut, image_size=t.image_size)
    return resolve(c)
