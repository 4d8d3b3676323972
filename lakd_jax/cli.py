"""Runs the command line: flags, error messages, exit codes."""

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lakd_jax import errors
from lakd_jax import fields as fields_lib
from lakd_jax.config import command_line
from lakd_jax.runtime import interrupt

USAGE = """\
python main.py --config=configs/digits_lakd.py [--workdir=DIR] [--dry_run]
               [--config.FIELD=VALUE ...] [--coordinator=HOST:PORT
               --num_processes=N --process_id=I] [--wait=SECONDS]
python main.py --mode=export --workdir=DIR --to=safetensors|torch|stablehlo|onnx
               [--which=last|best]
python main.py --mode=explain --workdir=DIR [--points=short|official [--masks=DIR]]
python main.py --mode=evaluate --workdir=DIR [--images=DIR]
               [--config.data.source=SOURCE]
python main.py --mode=networks|teachers

  --config      a Python file with get_config(arg); FILE.py:ARG passes ARG to it
  --workdir     the run's directory; the same command resumes a stopped run
                (default: runs/ and the name of the config file)
  --dry_run     build everything, run one step and one evaluation batch, stop
  --config.X    changes one field; docs/configuration.md lists them with their meaning
  --coordinator address of process 0 of N; every process is started with the same
                command, except for --process_id, counted from 0; all share --workdir.
                Without it, processes that srun, mpirun or a TPU slice has started
                together train one run. auto: the same, or an error if there are
                none; none: this process alone
  --wait        seconds to wait for the other processes (default: 120)
  --mode        train (default); export: write the student of the finished run in
                --workdir to DIR/export, with a model card; explain: write
                DIR/report.html about it; evaluate: write DIR/evaluation, what the
                student answers on its test split, or on other images; networks,
                teachers: list the networks, the weights that teacher.init can name
  --points      also report how much was learnt, in knowledge points: short (20 images,
                40 rounds of 24 noisy copies each, for up to 15 checkpoints of each
                network) or official (50 images, 80 rounds of 96)
  --masks       a folder with masks of the objects in test images, for --points
  --images      a folder of images to evaluate on, in class folders or without labels
  --to          safetensors, torch: weights with PyTorch's names and layout;
                stablehlo, onnx: the entire computation, for JAX or ONNX Runtime
  --which       last (default): the student of the last epoch; best: of the epoch
                that was best on minival"""

MODES = ("train", "export", "explain", "evaluate", "networks", "teachers")


def main(argv: list[str] | None = None) -> None:
    """Runs the command and ends the process with the documented exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE)
        sys.exit(0 if argv else 2)
    end_with(lambda guard: _run(argv, guard))


def end_with(work: Callable[[interrupt.Guard], None]) -> NoReturn:
    """Calls `work` and ends the process with the documented exit code.

    Errors meant for the user are printed without a traceback.
    """
    # Python's own handler would wait for a compilation to end, see Guard.released.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    except OSError as e:  # a full or lost disk, where the run does not handle it
        print(ten_lines(str(e)), file=sys.stderr)
        code = 2
    guard.leave(code)
    sys.exit(code)


def _run(argv: list[str], guard: interrupt.Guard) -> None:
    overrides, base = command_line.split(argv)
    values, problem = command_line.attempt(base)
    problems = _misplaced(values, overrides) if values else [problem]
    if problems:
        raise errors.ConfigError(problems)
    if values.mode == "networks":
        from lakd_jax.models import describe  # starts JAX, like all imports below

        for line in describe.table():
            guard.check()
            print(line, flush=True)
    elif values.mode == "teachers":
        from lakd_jax.interop import published

        for line in published.table():
            print(line)
    elif values.mode == "export":
        from lakd_jax import export

        with guard.released():
            export.run(values.workdir, values.to, which=values.which)
    elif values.mode == "explain":
        from lakd_jax import explain

        explain.run(
            values.workdir, points=values.points, masks=values.masks, guard=guard
        )
    elif values.mode == "evaluate":
        from lakd_jax import evaluation

        changes = command_line.changes(overrides, evaluation.FIELDS)
        evaluation.run(
            values.workdir, changes=changes, images=values.images, guard=guard
        )
    else:
        _train(argv, values, guard)


def _misplaced(values: Any, overrides: list[list[str]]) -> list[str]:
    """Returns messages about flags that the mode does not accept, or lacks."""
    if fault := fields_lib.fault(values.mode, MODES):
        return [f"--mode {fault}"]
    given = {
        "--config": values.config is not None,
        "--dry_run": values.dry_run,
        "--workdir": bool(values.workdir),
        "--to": bool(values.to),
        "--images": bool(values.images),
        "--points": bool(values.points),
        "--masks": bool(values.masks),
        "--which": values.which != "last",
        "--coordinator": bool(values.coordinator),
        "--num_processes": values.num_processes is not None,
        "--process_id": values.process_id is not None,
        "--wait": values.wait is not None,
        **{override[0].partition("=")[0]: True for override in overrides},
    }
    accepted = {
        "train": given.keys() - {"--to", "--images", "--which", "--points", "--masks"},
        "evaluate": {"--workdir", "--images", *(f for f in given if "config." in f)},
        "export": {"--workdir", "--to", "--which"},
        "explain": {"--workdir", "--points", "--masks"},
        "networks": set(),
        "teachers": set(),
    }[values.mode]
    problems = [
        f"{flag} has no effect with --mode={values.mode}; remove it"
        for flag, is_given in given.items()
        if is_given and flag not in accepted
    ]
    needed = {"export": ("--workdir", "--to")}.get(values.mode, ("--workdir",))
    if values.mode in ("export", "explain", "evaluate"):
        problems += [
            f"{flag} is missing, which --mode={values.mode} needs"
            for flag in needed
            if not given[flag]
        ]
    return problems


def _train(argv: list[str], values: Any, guard: interrupt.Guard) -> None:
    from lakd_jax.runtime import hosts

    process = (values.coordinator, values.num_processes, values.process_id, values.wait)
    if fault := hosts.fault(*process):
        raise errors.ConfigError([fault])
    with contextlib.ExitStack() as stack:
        with guard.released():
            has_others = hosts.join(*process)
        if has_others:
            guard.leave = hosts.leave
            stack.enter_context(hosts.together())
            guard = stack.enter_context(hosts.Guard())
        config, workdir, dry_run = command_line.parse(argv)
        from lakd_jax.runs import command

        if dry_run:
            command.dry_run(config, guard=guard)
        else:
            command.run(config, workdir, guard=guard)


def ten_lines(text: str) -> str:
    """Truncates `text` to ten lines; the last one counts the omitted lines."""
    lines = text.splitlines()
    if len(lines) <= 10:
        return text
    return "\n".join([*lines[:9], f"... and {len(lines) - 9} more"])
