"""The command line: flags, error lines, exit codes."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from lakd_jax import config as config_lib
from lakd_jax import errors, paths
from lakd_jax import fields as fields_lib
from lakd_jax.runtime import interrupt

_CONFIG = ("--config", "-config")
_OVERRIDE = re.compile(r"--?(no)?config\.")

USAGE = """\
python main.py --config=configs/digits_lakd.py [--workdir=DIR] [--dry_run]
               [--config.FIELD=VALUE ...] [--coordinator=HOST:PORT
               --num_processes=N --process_id=I]
python main.py --mode=export --workdir=DIR --to=safetensors|torch|stablehlo
python main.py --mode=explain --workdir=DIR
python main.py --mode=networks

  --config      a Python file with get_config(arg); FILE.py:ARG hands ARG over
  --workdir     where the run is kept; the same command again goes on from there
                (default: runs/ and the name of the config file)
  --dry_run     build everything, run one step and one evaluation batch, stop
  --config.X    changes one field; docs/configuration.md lists them with their meaning
  --coordinator where process 0 of N can be reached, each of which is given the same
                command but its own --process_id, from 0; all share --workdir.
                --coordinator=auto alone: as Slurm, a TPU pod or MPI says
  --mode        train (default); export: write the student of the finished run in
                --workdir to DIR/export, with a model card; explain: write
                DIR/report.html about it; networks: list them
  --to          safetensors, torch: weights in PyTorch's names and layout;
                stablehlo: the whole computation, for JAX alone"""

MODES = ("train", "export", "explain", "networks")


def main(argv: list[str] | None = None) -> None:
    """Runs the command and ends the process with the documented exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE)
        sys.exit(0 if argv else 2)
    end_with(lambda guard: _run(argv, guard))


def end_with(work: Callable[[interrupt.Guard], None]) -> NoReturn:
    """Does the work and ends the process with the documented exit code.

    Faults meant for the user are printed without a traceback.
    """
    guard = interrupt.Guard()
    try:
        with guard:
            work(guard)
        code = 0
    except interrupt.Interrupted:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        code = 0
    except errors.LakdError as e:
        print(ten_lines(str(e)), file=sys.stderr)
        code = e.exit_code
    except OSError as e:  # a full or lost disk, outside what the run guards itself
        print(ten_lines(str(e)), file=sys.stderr)
        code = 2
    guard.leave(code)
    # An abandoned compilation may still run in a thread, see interrupt.Guard.
    interrupt.exit_now(code)


def _run(argv: list[str], guard: interrupt.Guard) -> None:
    overrides, base = _split(argv)
    values, problem = _attempt(base)
    problems = _misplaced(values, overrides) if values else [problem]
    if problems:
        raise errors.ConfigError(problems)
    if values.mode == "networks":
        from lakd_jax.models import describe  # starts JAX, as all below

        for line in describe.table():
            guard.check()
            print(line, flush=True)
    elif values.mode == "export":
        from lakd_jax import export

        guard.run(export.run, values.workdir, values.to)
    elif values.mode == "explain":
        from lakd_jax import explain

        explain.run(values.workdir, guard=guard)
    else:
        _train(argv, values, guard)


def _misplaced(values: Any, overrides: list[list[str]]) -> list[str]:
    """Flags that the mode does not take, or takes and did not get."""
    if fault := fields_lib.fault(values.mode, MODES):
        return [f"--mode {fault}"]
    given = {
        "--config": values.config is not None,
        "--dry_run": values.dry_run,
        "--workdir": bool(values.workdir),
        "--to": bool(values.to),
        "--coordinator": bool(values.coordinator),
        "--num_processes": values.num_processes is not None,
        "--process_id": values.process_id is not None,
        **{override[0].partition("=")[0]: True for override in overrides},
    }
    taken = {
        "train": given.keys() - {"--to"},
        "export": {"--workdir", "--to"},
        "explain": {"--workdir"},
        "networks": set(),
    }[values.mode]
    problems = [
        f"{flag} means nothing with --mode={values.mode}; leave it out"
        for flag, is_given in given.items()
        if is_given and flag not in taken
    ]
    if values.mode in ("export", "explain"):
        problems += [
            f"{flag} is missing, which --mode={values.mode} needs"
            for flag in sorted(taken, reverse=True)
            if not given[flag]
        ]
    return problems


def _train(argv: list[str], values: Any, guard: interrupt.Guard) -> None:
    from lakd_jax.runtime import hosts

    where = (values.coordinator, values.num_processes, values.process_id)
    if fault := hosts.fault(*where):
        raise errors.ConfigError([fault])
    with contextlib.ExitStack() as stack:
        if values.coordinator:
            guard.run(hosts.connect, *where)
            guard.leave = hosts.leave
            stack.enter_context(hosts.together())
            guard = stack.enter_context(hosts.Guard())
        config, workdir, dry_run = parse(argv)
        from lakd_jax.runs import command

        if dry_run:
            command.dry_run(config, guard=guard)
        else:
            command.run(config, workdir, guard=guard)


def ten_lines(text: str) -> str:
    """At most ten lines; the last says how many were left out."""
    lines = text.splitlines()
    if len(lines) <= 10:
        return text
    return "\n".join([*lines[:9], f"... and {len(lines) - 9} more"])


def parse(argv: list[str]) -> tuple[config_lib.ConfigDict, str, bool]:
    """The config with its overrides, the run's directory, and `dry_run`.

    Raises:
      errors.ConfigError: naming every flag and override that is not right, and
        what is wrong with the config beside them.
    """
    overrides, base = _split(argv)
    values, problem = _attempt(base)
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
        # One at a time: absl stops at the first fault, a person wants them all.
        _, problem = _attempt([*base, *override], values.config)
        if problem:
            problems[_field(override)] = problem
        else:
            good += override
    values, problem = _attempt([*base, *good])
    if values is None:
        raise errors.ConfigError([problem])
    if fault := paths.fault(values.workdir):
        problems["--workdir"] = f"--workdir {fault}"
    if problems:
        raise errors.ConfigError([*problems.values(), *_others(values, problems)])
    file = config_flags.get_config_filename(values["config"])
    workdir = values.workdir or str(Path("runs") / Path(file.split(":")[0]).stem)
    return values.config, workdir, values.dry_run


def _others(values: Any, known: Collection[str]) -> list[str]:
    """What is wrong with the config apart from the fields in `known`."""
    import jax

    from lakd_jax.config import check

    return check.problems(values.config, jax.device_count(), skip=known)


def _field(override: list[str]) -> str:
    return override[0].split("config.", 1)[1].partition("=")[0]


def _split(argv: list[str]) -> tuple[list[list[str]], list[str]]:
    """Overrides, each with its value, apart from all other arguments."""
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


def _expanded(arg: str) -> str:
    """`arg` with the `~` of --config expanded: ml_collections opens the file itself."""
    flag, equals, value = arg.partition("=")
    if not equals:  # it may be the value of the flag before
        return os.path.expanduser(arg)
    return f"{flag}={os.path.expanduser(value)}" if flag in _CONFIG else arg


def _attempt(
    argv: list[str], known: config_lib.ConfigDict | None = None
) -> tuple[Any, str]:
    """Parses `argv`: (flag values, "") or (None, what is wrong with it)."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "file with get_config()", values, sys_argv=["main.py", *argv]
    )
    flags.DEFINE_string("workdir", "", "directory of the run", values)
    flags.DEFINE_boolean("dry_run", False, "one step, then stop", values)
    flags.DEFINE_string("mode", "train", "what to do", values)
    flags.DEFINE_string("to", "", "what to export to", values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, or auto", values)
    flags.DEFINE_integer("num_processes", None, "how many", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them", flag_values=values)
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
    """One line for a flag that could not be parsed."""
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
    from lakd_jax.config import check

    override = argv[next(i for i, a in enumerate(argv) if _OVERRIDE.match(a)) :]
    field, fields = _field(override), config_lib.flat(known)
    if field not in fields:
        return check.unknown_field(field, fields)
    if override == [f"--config.{field}"]:
        return f"--config.{field} has no value; write --config.{field}=VALUE"
    value = " ".join(override).replace("=", " ", 1).partition(" ")[2]
    return f"{field} must be {type(fields[field]).__name__}, is {value!r}"
