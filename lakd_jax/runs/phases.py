"""A run of any student; an HME's is two trainings, in one command."""

from pathlib import Path
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax.hme import phases
from lakd_jax.interop import weights
from lakd_jax.runs import single
from lakd_jax.runtime import hosts
from lakd_jax.store import workdir

_TOLD = ("epochs", "test_last", "test_best_on_minival", "best_step", "kept_step")
_TOLD += ("seconds", "step_seconds", "images_per_second")


def has_stages(config: config_lib.ConfigDict) -> bool:
    """Whether the student is trained twice."""
    return config.student.name == "hme"


def train(
    config: config_lib.ConfigDict,
    directory: Path,
    bench: single.Bench,
    teacher: single.Teacher | None,
) -> dict[str, Any]:
    """As `runs.train_one`; an HME's stage 1 first, in `directory`/stage1.

    Stage 2 starts from what stage 1 kept: its best epoch on minival, or its last one
    where there is no minival. `directory` then holds what any run's does, of the hard
    tree, and `result.json` tells of stage 1 under "stage1".
    """
    done = directory / workdir.RESULT
    if not has_stages(config) or hosts.first(done.exists):
        return single.train_one(config, directory, bench, teacher)
    folder = directory / workdir.STAGE1
    if not hosts.first((folder / workdir.RESULT).exists):
        bench.notify(f"stage 1 of 2, weights and gates, in {folder}")
    stage = phases.first(config)
    with single.prepare(folder, config):
        result = single.train_one(stage.config, folder, bench, teacher, stage)
    kept, _ = weights.student(folder / workdir.STUDENT, config.dtype)
    bench.notify(f"stage 2 of 2, the tree of step {result['kept_step']} anew")
    told = {name: result[name] for name in _TOLD}
    stage = phases.second(config, kept.variables, told)
    return single.train_one(config, directory, bench, teacher, stage)


def parts(
    config: config_lib.ConfigDict,
    directory: Path,
    bench: single.Bench,
    teacher: single.Teacher | None,
    *,
    dry: bool = False,
) -> single.Parts:
    """As `runs.parts`; of an HME's stage 1."""
    if not has_stages(config):
        return single.parts(config, directory, bench, teacher, dry=dry)
    stage = phases.first(config)
    return single.parts(stage.config, directory, bench, teacher, stage, dry=dry)
