"""Parses the command line: flags, the config file and its overrides."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lakd_jax import config as config_lib
from lakd_jax import errors, paths
from lakd_jax import fields as fields_lib

_CONFIG = ("--config", "-config")
_OVERRIDE = re.compile(r"--?(no)?config\.")


def parse(argv: list[str]) -> tuple[config_lib.ConfigDict, str, bool]:
    """Returns the config with its overrides, the run's directory, and `dry_run`.

    Raises:
      errors.ConfigError: lists every flag and override that is wrong, and
        the other faults of the config.
    """
    overrides, base = split(argv)
    values, problem = attempt(base)
    if values is None:
        raise errors.ConfigError([problem])
    if values.config is None:
        example = "--config=configs/digits_lakd.py"
        raise errors.ConfigError([f"--config is missing, e.g. {example}"])
    if not isinstance(values.config, config_lib.ConfigDict):
        kind = type(values.config).__name__
        raise errors.ConfigError([f"--config: get_config() gave {kind}, no ConfigDict"])
    good, problems = [], {}
    for override in overrides:
        # One at a time: absl stops at the first fault, and all are to be reported.
        _, problem = attempt([*base, *override], values.config)
        if problem:
            problems[_field(override)] = problem
        else:
            good += override
    values, problem = attempt([*base, *good])
    if values is None:
        raise errors.ConfigError([problem])
    if fault := paths.place_fault(values.workdir):
        problems["--workdir"] = f"--workdir {fault}"
    if problems:
        raise errors.ConfigError([*problems.values(), *_others(values, problems)])
    file = config_flags.get_config_filename(values["config"])
    workdir = values.workdir or str(Path("runs") / Path(file.split(":")[0]).stem)
    return values.config, workdir, values.dry_run


def _others(values: Any, known: Collection[str]) -> list[str]:
    """Returns the faults of the config, except for the fields in `known`."""
    import jax

    from lakd_jax.config import check

    return check.problems(values.config, jax.device_count(), skip=known)


def _field(override: list[str]) -> str:
    return override[0].split("config.", 1)[1].partition("=")[0]


def split(argv: list[str]) -> tuple[list[list[str]], list[str]]:
    """Splits `argv` into overrides, each with its value, and all other arguments."""
    overrides, base, rest = [], [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not _OVERRIDE.match(arg):
            base.append(_expanded(arg))
        elif "=" not in arg and rest and not rest[0].startswith("-"):
            overrides.append([arg, rest.pop(0)])
        else:
            overrides.append([arg])
    return overrides, base


def changes(overrides: list[list[str]], allowed: Collection[str]) -> dict[str, Any]:
    """Returns the values of overrides, by field, for use without a config file.

    Raises:
      errors.ConfigError: a field is not in `allowed`, or a value has another type.
    """
    found, problems = {}, []
    known = config_lib.flat(config_lib.default())
    for override in overrides:
        field, value = _field(override), " ".join(override).partition("=")[2]
        if field not in allowed:
            problems.append(
                f"{field} cannot be changed here, only {', '.join(allowed)}"
            )
        else:
            kind = type(known[field])
            try:
                found[field] = kind(value)
            except ValueError:
                problems.append(f"{field} must be {kind.__name__}, is {value!r}")
    if problems:
        raise errors.ConfigError(problems)
    return found


def _expanded(arg: str) -> str:
    """Expands the `~` of --config, since ml_collections opens the file itself."""
    flag, equals, value = arg.partition("=")
    if not equals:  # it may be the value of the flag before
        return os.path.expanduser(arg)
    return f"{flag}={os.path.expanduser(value)}" if flag in _CONFIG else arg


def attempt(
    argv: list[str], known: config_lib.ConfigDict | None = None
) -> tuple[Any, str]:
    """Parses `argv`; returns (flag values, "") or (None, the fault)."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "file with get_config()", values, sys_argv=["main.py", *argv]
    )
    flags.DEFINE_string("workdir", "", "directory of the run", values)
    flags.DEFINE_boolean("dry_run", False, "one step, then stop", values)
    flags.DEFINE_string("mode", "train", "what to do", values)
    flags.DEFINE_string("to", "", "what to export to", values)
    flags.DEFINE_string("which", "last", "which weights to export", values)
    flags.DEFINE_string("images", "", "a folder of images", values)
    flags.DEFINE_string(
        "points", "", "to what extent knowledge points are measured", values
    )
    flags.DEFINE_string("masks", "", "a folder of masks", values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT, auto or none", values)
    flags.DEFINE_integer("num_processes", None, "how many", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them", flag_values=values)
    flags.DEFINE_integer("wait", None, "seconds to wait for them", flag_values=values)
    try:
        rest = values(["main.py", *argv])[1:]
        getattr(values.config, "keys", None)  # raises if the file was not loaded
    except Exception as e:  # a config is Python: whatever it raises is its fault
        return None, _reason(argv, e, known)
    if rest:
        return None, f"{rest[0]!r} is not understood; flags are written --name=value"
    return values, ""


def _reason(
    argv: list[str], error: Exception, known: config_lib.ConfigDict | None
) -> str:
    """Returns one line for a flag that could not be parsed."""
    text = str(error)
    if known is None and isinstance(error, flags.Error) and "\n" not in text:
        return f"flags: {text}"
    if known is None:
        # What the file itself raised is the last of many lines.
        cause = text.splitlines()[-1].split("failure to load: ")[-1].strip()
        if not isinstance(error, flags.Error | OSError):
            cause = f"{type(error).__name__}: {cause}"
        file = re.search(r"-config[= ](\S+)", " ".join(argv))
        return f"{file.group(1) if file else '--config'}: {cause}"
    override = argv[next(i for i, a in enumerate(argv) if _OVERRIDE.match(a)) :]
    field, fields = _field(override), config_lib.flat(known)
    if field not in fields:
        return fields_lib.unknown_field(field, fields)
    if override == [f"--config.{field}"]:
        return f"--config.{field} has no value; write --config.{field}=VALUE"
    value = " ".join(override).replace("=", " ", 1).partition(" ")[2]
    fault = f"{field} must be {type(fields[field]).__name__}, is {value!r}"
    if not isinstance(fields[field], tuple):
        return fault
    return f'{fault}: write --config.{field}="{tuple(value.split(","))}"'
