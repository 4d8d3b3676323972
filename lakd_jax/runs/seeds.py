"""Trains several seeds of one config, one after another.

Each seed's directory is that of an ordinary run: it can be resumed, exported,
explained and used as a teacher like one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lakd_jax.config import resolved
from lakd_jax.runs import phases, single


@dataclasses.dataclass(frozen=True)
class SeedRun:
    """The config of a single seed, and its prepared directory."""

    config: resolved.Config
    directory: Path


def of_config(config: resolved.Config, directory: Path) -> list[SeedRun]:
    """Returns one run per seed; without `config.seeds`, one in `directory` itself."""
    if not config.seeds:
        return [SeedRun(config, directory)]
    return [
        SeedRun(
            dataclasses.replace(config, seeds=(), seed=seed),
            directory / f"seed{seed}",
        )
        for seed in config.seeds
    ]


def train(
    runs: Sequence[SeedRun],
    environment: single.Environment,
    teacher: single.Teacher | None,
) -> list[dict[str, Any]]:
    """Trains the seeds that are not finished; returns the results of all."""
    results = []
    for run in runs:
        if len(runs) > 1:
            environment.notify(f"seed {run.config.seed}")
        results.append(phases.train(run.config, run.directory, environment, teacher))
    return results
