"""Training: `run(config, workdir)` does all that a command line asks for."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from lakd_jax import backend, distill, hosts, interrupt, validate, workdir
from lakd_jax import config as config_lib
from lakd_jax.report import table
from lakd_jax.train import costs, hme_runs, look, networks, runs

TITLES = {
    "none": "alone",
    "kd": "KD",
    "lakd": "LAKD",
    "afd": "AFD",
    "rtk": "RTK (our reading)",
}


def run(
    config: config_lib.ConfigDict,
    directory: str | Path,
    *,
    guard: interrupt.Guard | None = None,
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains the teacher if need be, the baselines, the student; draws and tells.

    Called again on the same directory it goes on where it was stopped, and tells
    the result again if it had finished.

    Args:
      config: from a file in `configs/`, not yet resolved.
      directory: of the run; baselines are kept in subdirectories.
      guard: signals to stop at; None installs one for the time of the call.
      notify: receives every line meant for the person watching.

    Returns:
      What `result.json` in the directory holds.

    Raises:
      errors.LakdError: see `lakd_jax.errors` for the kinds.
    """
    config, directory, notify = _begin(config), Path(directory), hosts.notifier(notify)
    with contextlib.ExitStack() as stack:
        guard = guard or stack.enter_context(hosts.guard())
        settings = config_lib.to_dict(config)
        stack.enter_context(_claimed(directory, settings))
        bench = runs.bench(config, guard, notify)
        notify(_describe_data(bench))
        methods = [*config.baselines, config.method]
        teacher = None
        if any(distill.METHODS[m].needs_teacher for m in methods):
            teacher = runs.make_teacher(config, bench)
        results = {}
        for method in config.baselines:
            notify(_title(config, method))
            results[method] = _baseline(config, method, directory, bench, teacher)
        notify(_title(config, config.method))
        result = hme_runs.train(config, directory, bench, teacher)
        results[config.method] = result
        folders = {TITLES[m]: directory / m for m in config.baselines}
        folders[TITLES[config.method]] = directory
        look.draw(config, directory, bench, teacher, folders)
        text = _table(config, results, teacher)
        hosts.first(lambda: (directory / "table.md").write_text(text + "\n"))
        notify(f"\n{text}\n\nPictures, metrics and the student are in {directory}")
    return result


def _begin(config: config_lib.ConfigDict) -> config_lib.ConfigDict:
    """The config, resolved: it can be run here, and all processes have the same."""
    validate.require(config, jax.device_count())
    backend.prepare(config.compile_cache)
    code = workdir.code()
    own = {**code["versions"], "commit of the code": code["commit"]}
    hosts.agree({**config_lib.flat(config), **own})
    return config_lib.resolve(config)


@contextlib.contextmanager
def _claimed(directory: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The run's directory, free for another config if it fails before training.

    A path that was mistyped may then be corrected and the command given again.
    """
    with workdir.prepare(directory, settings):
        try:
            yield
        except BaseException:
            begun = ("checkpoints", networks.RESULT_FILE, hme_runs.STAGE1)
            left = any((directory / name).exists() for name in begun)
            if hosts.is_first() and not left:
                (directory / workdir.CONFIG).unlink(missing_ok=True)
            raise


def _baseline(
    config: config_lib.ConfigDict,
    method: str,
    directory: Path,
    bench: runs.Bench,
    teacher: runs.Teacher | None,
) -> dict[str, Any]:
    own = config_lib.changed(config, {"method": method, "baselines": ()})
    with workdir.prepare(directory / method, config_lib.to_dict(own)):
        return hme_runs.train(own, directory / method, bench, teacher)


def _title(config: config_lib.ConfigDict, method: str) -> str:
    attention = " with VAM" if config.student.vam.enabled else ""
    return f"{config.student.name}{attention}, {TITLES[method]}"


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
    bench = runs.bench(config, guard, notify)
    notify(_describe_data(bench))
    teacher = None
    if distill.METHODS[config.method].needs_teacher:
        teacher = runs.stand_in(config, bench) or runs.make_teacher(config, bench)
    with tempfile.TemporaryDirectory() as scratch:
        job, student = hme_runs.assemble(config, Path(scratch), bench, teacher)
        notify(costs.one_step(config, bench, job, student, teacher))


def _describe_data(bench: runs.Bench) -> str:
    d = bench.dataset
    height, width, _ = d.train.images.shape[1:]
    minival = f", {len(d.minival):,} minival" if d.minival else ""
    return (
        f"data {d.name}: {len(d.train):,} training{minival}, {len(d.test):,} test "
        f"images of {height}x{width}, {len(d.classes)} classes"
    )


def _table(
    config: config_lib.ConfigDict,
    results: dict[str, dict[str, Any]],
    teacher: runs.Teacher | None,
) -> str:
    rows = [runs.row(r, _title(config, m)) for m, r in results.items()]
    if teacher:
        rows.insert(0, runs.teacher_row(config, teacher))
    return table.render(rows)
