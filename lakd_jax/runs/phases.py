"""Trains a run of any student; a network with phases is trained in two phases."""

from pathlib import Path
from typing import Any

from lakd_jax.config import resolved
from lakd_jax.interop import weights
from lakd_jax.runs import phase_run, single
from lakd_jax.runtime import hosts
from lakd_jax.store import workdir
from lakd_jax.training import phase as phase_lib

_RECORDED = ("epochs", "test_last", "test_best_on_minival", "best_step", "kept_step")
_RECORDED += ("seconds", "step_seconds", "images_per_second")


def train(
    config: resolved.Config,
    directory: Path,
    environment: single.Environment,
    teacher: single.Teacher | None,
) -> dict[str, Any]:
    """Trains a student in all its phases; most have one, see `phase_run.train_one`.

    `environment` is that of the teacher, see `single.of_student`.

    The first of two phases runs in `directory`/stage1. The second starts from the
    variables that the first kept: those of its best epoch on minival, or of its last
    epoch without a minival. `directory` has the same files as any run's, and
    `result.json` describes the first phase under "stage1".
    """
    environment = single.of_student(config, environment)
    done = directory / workdir.RESULT
    phase, module = phase_lib.first(config), phase_lib.module_of(config.student.name)
    if module is None or hosts.first(done.exists):
        return phase_run.train_one(phase, directory, environment, teacher)
    folder = directory / workdir.STAGE1
    if not hosts.first((folder / workdir.RESULT).exists):
        environment.notify(f"stage 1 of 2, weights and gates, in {folder}")
    with single.prepare(folder, config, folder=environment.folder):
        result = phase_run.train_one(phase, folder, environment, teacher)
    kept, _ = weights.student(folder / workdir.STUDENT, config.dtype)
    environment.notify(
        f"stage 2 of 2, retraining the tree of step {result['kept_step']}"
    )
    facts = {name: result[name] for name in _RECORDED}
    phase = module.second(config, kept.variables, facts)
    return phase_run.train_one(phase, directory, environment, teacher)
