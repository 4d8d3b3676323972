"""The training command: `run(config, workdir)` does all that it asks for."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lakd_jax import config as config_lib
from lakd_jax import distill, paths
from lakd_jax.config import check
from lakd_jax.report import table
from lakd_jax.runs import dry_run as dry_run_lib
from lakd_jax.runs import pictures, rows, seeds, single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import backend, hosts, interrupt
from lakd_jax.store import workdir
from lakd_jax.training import phase


def run(
    config: config_lib.ConfigDict,
    directory: str | Path,
    *,
    guard: interrupt.Guard | None = None,
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains the teacher if need be, the baselines, the student; draws and tells.

    Called again on the same directory it goes on where it was stopped, and tells
    the result again if it had finished. With `config.seeds` each seed has a directory
    in `directory`, like a run of its own, and the table tells means; seeds may be
    added later.

    Args:
      config: from a file in `configs/`, not yet resolved.
      directory: of the run; baselines are kept in subdirectories.
      guard: signals to stop at; None installs one for the time of the call.
      notify: receives every line meant for the person watching.

    Returns:
      What `result.json` in the directory holds; with `config.seeds`, `{"seeds":
      [one each]}`.

    Raises:
      errors.LakdError: see `lakd_jax.errors` for the kinds.
    """
    config, notify = _begin(config, directory), hosts.notifier(notify)
    directory = paths.local(directory, "--workdir")
    with contextlib.ExitStack() as stack:
        guard = guard or stack.enter_context(hosts.guard())
        stack.enter_context(_claimed(directory, config))
        wanted = seeds.of_config(config, directory)
        for one in wanted if config.seeds else ():
            stack.enter_context(single.prepare(one.directory, one.config))
        environment = single.environment(config, guard, notify)
        notify(_describe_data(environment))
        methods = [*config.baselines, config.method]
        teacher = None
        if any(distill.facts(m).needs_teacher for m in methods):
            teacher = teacher_lib.make(config, environment)
            hosts.first(functools.partial(teacher_lib.require_same, directory, teacher))
        results = {}
        for method in config.baselines:
            notify(_title(config, method))
            results[method] = _baselines(wanted, method, environment, teacher)
        notify(_title(config, config.method))
        results[config.method] = seeds.train(wanted, environment, teacher)
        for one in wanted:
            _draw(one, environment, teacher)
        text = _table(config, results, teacher)
        hosts.first(lambda: (directory / workdir.TABLE).write_text(text + "\n"))
        notify(f"\n{text}\n\n{_where(wanted, directory)}")
    last = results[config.method]
    return {"seeds": last} if config.seeds else last[0]


def _draw(
    one: seeds.SeedRun, environment: single.Environment, teacher: single.Teacher | None
) -> None:
    folders = {distill.title(m): one.directory / m for m in one.config.baselines}
    folders[distill.title(one.config.method)] = one.directory
    draw = functools.partial(
        pictures.draw, one.config, one.directory, environment, teacher
    )
    hosts.first(lambda: draw(folders))


def _where(wanted: Sequence[seeds.SeedRun], directory: Path) -> str:
    if len(wanted) == 1:
        directory = wanted[0].directory
        return f"Pictures, metrics and the student are in {directory}"
    names = ", ".join(one.directory.name for one in wanted)
    return f"Pictures, metrics and students are in {names} of {directory}"


def _begin(
    config: config_lib.ConfigDict, directory: str | Path = ""
) -> config_lib.ConfigDict:
    """The config, resolved: it can be run here, and all processes have the same."""
    hosts.require_connected()
    check.require(config, jax.device_count(), directory)
    backend.prepare(config.compile_cache)
    code = workdir.code()
    own = {**code["versions"], "commit of the code": code["commit"]}
    hosts.agree({**config_lib.flat(config), **own})
    return config_lib.resolve(config)


@contextlib.contextmanager
def _claimed(directory: Path, config: config_lib.ConfigDict) -> Iterator[None]:
    """The run's directory, free for another config if it fails before training.

    A path that was mistyped may then be corrected and the command given again.
    """
    with single.prepare(directory, config, may_change=("seeds",)):
        try:
            yield
        except BaseException:
            begun = (workdir.CHECKPOINTS, workdir.RESULT, workdir.STAGE1)
            folders = [directory, *directory.glob("seed*")]
            left = any((f / name).exists() for f in folders for name in begun)
            if hosts.is_first() and not left:
                for folder in folders:
                    for name in (workdir.CONFIG, workdir.TEACHER):
                        (folder / name).unlink(missing_ok=True)
            raise


def _baselines(
    wanted: Sequence[seeds.SeedRun],
    method: str,
    environment: single.Environment,
    teacher: single.Teacher | None,
) -> list[dict[str, Any]]:
    """Of all seeds, each in METHOD of the seed's directory."""
    change = {"method": method, "baselines": ()}
    own = [
        seeds.SeedRun(config_lib.changed(w.config, change), w.directory / method)
        for w in wanted
    ]
    with contextlib.ExitStack() as stack:
        for one in own:
            stack.enter_context(single.prepare(one.directory, one.config))
        return seeds.train(own, environment, teacher)


def _title(config: config_lib.ConfigDict, method: str) -> str:
    attention = " with VAM" if config.student.vam.enabled else ""
    return f"{config.student.name}{attention}, {distill.title(method)}"


def dry_run(
    config: config_lib.ConfigDict,
    *,
    guard: interrupt.Guard,
    notify: Callable[[str], None] = print,
) -> None:
    """Builds everything, runs one step and one evaluation batch, tells the costs.

    Nothing is written to a run's directory. A teacher that would be trained first
    stands in with random weights.
    """
    config, notify = _begin(config), hosts.notifier(notify)
    config = seeds.of_config(config, Path())[0].config
    environment = single.environment(config, guard, notify)
    notify(_describe_data(environment))
    teacher = None
    if distill.facts(config.method).needs_teacher:
        teacher = teacher_lib.stand_in(config, environment) or teacher_lib.make(
            config, environment
        )
    with tempfile.TemporaryDirectory() as scratch:
        first = phase.first(config)
        own = single.parts(first, Path(scratch), environment, teacher, dry=True)
        notify(dry_run_lib.one_step(config, environment, own, teacher))


def _describe_data(environment: single.Environment) -> str:
    d = environment.dataset
    height, width, _ = d.train.shape
    minival = f", {len(d.minival):,} minival" if d.minival else ""
    return (
        f"data {d.name}: {len(d.train):,} training{minival}, {len(d.test):,} test "
        f"images of {height}x{width}, {len(d.classes)} classes"
    )


def _table(
    config: config_lib.ConfigDict,
    results: dict[str, list[dict[str, Any]]],
    teacher: single.Teacher | None,
) -> str:
    lines = [rows.row(r, _title(config, m)) for m, own in results.items() for r in own]
    if teacher:
        lines.insert(0, rows.teacher_row(config, teacher))
    return table.render_seeds(lines) if config.seeds else table.render(lines)
