"""Implements the training command: `run(config, workdir)`, and its dry run."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lakd_jax import config as config_lib
from lakd_jax import distill, errors, paths
from lakd_jax.config import check, resolved
from lakd_jax.data.streaming import workers
from lakd_jax.report import metrics, table
from lakd_jax.runs import dry_run as dry_run_lib
from lakd_jax.runs import pictures, rows, seeds, single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import backend, hosts, interrupt
from lakd_jax.store import bucket, locks, workdir
from lakd_jax.training import phase


def run(
    config: config_lib.ConfigDict,
    directory: str | Path,
    *,
    guard: interrupt.Guard | None = None,
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains all networks of a config, plots the results and prints the table.

    These are the teacher, unless it is already trained, the baselines, and the
    student. A second call with the same directory resumes a stopped run, and reports
    the result again if the run had finished. With `config.seeds` each seed has its
    own run directory in `directory`, and the table shows means; seeds may be added
    later. Relative paths start in the folder in which the run was first started, also
    if it is resumed from another.

    Args:
      config: as a file in `configs/` returns it, not yet resolved.
      directory: of the run; baselines are kept in subdirectories.
      guard: handles the signals that stop a run; None installs one for this call.
      notify: receives every line of console output.

    Returns:
      The content of `result.json` in the directory; with `config.seeds`,
      `{"seeds": [one result per seed]}`.

    Raises:
      errors.LakdError: one of its subclasses, see `lakd_jax.errors`.
    """
    notify = hosts.notifier(notify)
    c = _begin(config, directory, notify)
    directory = paths.place(directory, "--workdir")
    methods = [*c.baselines, c.method]
    with contextlib.ExitStack() as stack:
        guard = guard or stack.enter_context(hosts.guard())
        stack.enter_context(_claimed(directory, c))
        if c.teacher.cache and any(distill.facts(m).needs_teacher for m in methods):
            hosts.first(functools.partial(_check_cache, c.teacher.cache))
        folder = workdir.folder(directory)
        if folder != Path():
            notify(f"relative paths start in {folder}, where this run was started")
        runs = seeds.of_config(c, directory)
        for seed_run in runs if c.seeds else ():
            stack.enter_context(
                single.prepare(seed_run.directory, seed_run.config, folder=folder)
            )
        environment = dataclasses.replace(
            single.environment(c, guard, notify, folder), root=directory
        )
        notify(_describe_data(c, environment))
        teacher = None
        if any(distill.facts(m).needs_teacher for m in methods):
            teacher = teacher_lib.make(c, environment)
            hosts.first(functools.partial(teacher_lib.require_same, directory, teacher))
        results = {}
        for method in c.baselines:
            notify(_title(c, method))
            results[method] = _train_baseline(runs, method, environment, teacher)
        notify(_title(c, c.method))
        results[c.method] = seeds.train(runs, environment, teacher)
        for seed_run in runs:
            _draw(seed_run, environment, teacher)
        text = _table(c, results, teacher)
        table_file = directory / workdir.TABLE
        hosts.first(lambda: workdir.write_bytes(table_file, f"{text}\n".encode()))
        notify(f"\n{text}\n\n{_describe_files(runs, directory)}")
    last = results[c.method]
    return {"seeds": last} if c.seeds else last[0]


def _check_cache(cache: str) -> None:
    """Raises errors.WorkdirError if teachers are kept where nothing can be written."""
    if paths.is_bucket(cache):
        try:
            bucket.require_writable(paths.place(cache, "teacher.cache"))
        except errors.WorkdirError as error:
            raise errors.WorkdirError(f"teacher.cache: {error}") from error


def _draw(
    run: seeds.SeedRun, environment: single.Environment, teacher: single.Teacher | None
) -> None:
    folders = {distill.title(m): run.directory / m for m in run.config.baselines}
    folders[distill.title(run.config.method)] = run.directory
    draw = functools.partial(
        pictures.draw, run.config, run.directory, environment, teacher
    )
    hosts.first(lambda: draw(folders))


def _describe_files(runs: Sequence[seeds.SeedRun], directory: Path) -> str:
    if len(runs) == 1:
        directory = runs[0].directory
        return f"Pictures, metrics and the student are in {directory}"
    names = ", ".join(run.directory.name for run in runs)
    return f"Pictures, metrics and students are in {names} of {directory}"


def _begin(
    config: config_lib.ConfigDict,
    directory: str | Path = "",
    notify: Callable[[str], None] = print,
) -> resolved.Config:
    """Checks the config here and across processes; returns it resolved."""
    workers.refuse_in_worker()
    hosts.require_connected()
    check.require(config, jax.device_count(), directory)
    if remark := backend.prepare(config.compile_cache):
        notify(remark)
    code = workdir.code()
    versions = {**code["versions"], "commit of the code": code["commit"]}
    hosts.agree({**config_lib.flat(config), **versions})
    return resolved.resolve(config)


@contextlib.contextmanager
def _claimed(directory: Path, config: resolved.Config) -> Iterator[None]:
    """Locks the run's directory; releases it if the run fails before training.

    The user can then correct the config, e.g. a mistyped path, and start again.
    """
    with single.prepare(directory, config, may_change=("seeds",)):
        try:
            yield
        except BaseException:
            # A bucket has no folder of checkpoints before the first of them.
            traces = (workdir.CHECKPOINTS, workdir.RESULT, workdir.STAGE1)
            traces += (metrics.FILENAME,)
            folders = [directory, *directory.glob("seed*")]
            started = any((f / name).exists() for f in folders for name in traces)
            if hosts.is_first() and not started and locks.is_held(directory):
                for folder in folders:
                    for name in (workdir.CONFIG, workdir.TEACHER):
                        (folder / name).unlink(missing_ok=True)
            raise


def _train_baseline(
    runs: Sequence[seeds.SeedRun],
    method: str,
    environment: single.Environment,
    teacher: single.Teacher | None,
) -> list[dict[str, Any]]:
    """Trains all seeds of a baseline, in folder METHOD of each seed's directory."""
    baselines = [
        seeds.SeedRun(
            dataclasses.replace(run.config, method=method, baselines=()),
            run.directory / method,
        )
        for run in runs
    ]
    with contextlib.ExitStack() as stack:
        for baseline in baselines:
            stack.enter_context(
                single.prepare(
                    baseline.directory, baseline.config, folder=environment.folder
                )
            )
        return seeds.train(baselines, environment, teacher)


def _title(config: resolved.Config, method: str) -> str:
    attention = " with VAM" if config.student.vam.enabled else ""
    return f"{config.student.name}{attention}, {distill.title(method)}"


def dry_run(
    config: config_lib.ConfigDict,
    *,
    guard: interrupt.Guard,
    notify: Callable[[str], None] = print,
) -> None:
    """Builds everything, runs one step and one evaluation batch, reports the costs.

    Nothing is written to a run's directory. A teacher that would be trained first is
    replaced by one with random weights.
    """
    notify = hosts.notifier(notify)
    c = seeds.of_config(_begin(config, notify=notify), Path())[0].config
    environment = single.environment(c, guard, notify)
    notify(_describe_data(c, environment))
    teacher = None
    if distill.facts(c.method).needs_teacher:
        teacher = teacher_lib.stand_in(c, environment) or teacher_lib.make(
            c, environment
        )
    environment = single.of_student(c, environment)
    with tempfile.TemporaryDirectory() as scratch:
        first = phase.first(c)
        job = single.training_job(first, Path(scratch), environment, teacher, dry=True)
        notify(dry_run_lib.one_step(c, environment, job, teacher))


def _describe_data(config: resolved.Config, environment: single.Environment) -> str:
    d = environment.dataset
    height, width, _ = d.train.shape
    minival = f", {len(d.minival):,} minival" if d.minival else ""
    few = config.data.per_class
    return (
        f"data {d.name}: {len(d.train):,} training{minival}, {len(d.test):,} test "
        f"images of {height}x{width}, {len(d.classes)} classes"
        + (f"; the student sees {few} training images of each" if few else "")
    )


def _table(
    config: resolved.Config,
    results: dict[str, list[dict[str, Any]]],
    teacher: single.Teacher | None,
) -> str:
    lines = [
        rows.row(result, _title(config, method))
        for method, of_seeds in results.items()
        for result in of_seeds
    ]
    if teacher:
        lines.insert(0, rows.teacher_row(config, teacher))
    return table.render_seeds(lines) if config.seeds else table.render(lines)
