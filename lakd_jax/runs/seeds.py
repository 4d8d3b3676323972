"""Several seeds of one config: in turn, in one program, or on a device each.

Each seed's directory is that of an ordinary run: it can be resumed, exported,
explained and taken as a teacher alone.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lakd_jax import config as config_lib
from lakd_jax.runs import phases, single
from lakd_jax.runtime import backend, hosts
from lakd_jax.store import checkpoint, workdir
from lakd_jax.training import loop, teams
from lakd_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """A seed's config, of this seed alone, and its prepared directory."""

    config: config_lib.ConfigDict
    directory: Path

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return hosts.first((self.directory / workdir.RESULT).exists)


def train(
    wanted: Sequence[Run], by: str, bench: single.Bench, teacher: single.Teacher | None
) -> list[dict[str, Any]]:
    """The results of all seeds, as `phases.train` gives them.

    Those that are finished are not trained again.

    Args:
      wanted: in the order of the results; they differ by their seed alone.
      by: `config.seeds_by`.
    """
    waiting = [run for run in wanted if not run.finished]
    if len(waiting) > 1:
        how, until = _together(waiting, by)
        names = ", ".join(str(run.config.seed) for run in waiting)
        told = {
            "turn": "in turn",
            "program": "in one program",
            "device": "on a device each",
        }
        bench.notify(f"seeds {names}, {told[how]}")
        if how == "program":
            _in_one_program(waiting, until, bench, teacher)
        elif how == "device":
            _on_devices(waiting, until, bench, teacher)
    results = []
    for run in wanted:
        if len(waiting) > 1 and not run.finished:
            bench.notify(f"seed {run.config.seed}")
        results.append(phases.train(run.config, run.directory, bench, teacher))
    return results


def _together(waiting: Sequence[Run], by: str) -> tuple[str, int | None]:
    """How they are trained, and the step that all go on from (None: the first)."""
    config = waiting[0].config
    if by == "auto":
        by = "device" if jax.device_count() > 1 else "program"
        alone = phases.has_stages(config) or config.local.engine != "fused"
        alone = alone or config.teacher.views or hosts.count() > 1
        alone = alone or config.data.streaming
        if backend.on_cpu() or alone:
            by = "turn"
    saved = [
        set(hosts.first(lambda d=r.directory: checkpoint.list_steps(d / "checkpoints")))
        for r in waiting
    ]
    if not any(saved):
        return by, None
    until = min(max(steps, default=0) for steps in saved)
    if not all(until in steps for steps in saved):
        return "turn", None  # nothing that is done shall be done again
    return by, until


def _in_one_program(
    waiting: Sequence[Run],
    until: int | None,
    bench: single.Bench,
    teacher: single.Teacher | None,
) -> None:
    parts = [single.parts(r.config, r.directory, bench, teacher) for r in waiting]
    team = teams.Stacked(
        parts[0].learner,
        parts[0].source,
        [own.data for own in parts if isinstance(own.data, state_lib.Resident)],
        bench.guard.run,
    )
    _fit(parts, team, until, [bench] * len(parts), teacher)


def _on_devices(
    waiting: Sequence[Run],
    until: int | None,
    bench: single.Bench,
    teacher: single.Teacher | None,
) -> None:
    devices = jax.local_devices()
    meshes = [Mesh(np.array([d]), bench.mesh.axis_names) for d in devices]
    benches = [
        single.on_mesh(bench.dataset, mesh, bench.guard, bench.notify)
        for mesh in meshes[: len(waiting)]
    ]
    teachers = [_moved(teacher, own.mesh) for own in benches]
    places = [i % len(benches) for i in range(len(waiting))]
    parts = [
        single.parts(run.config, run.directory, benches[place], teachers[place])
        for run, place in zip(waiting, places, strict=True)
    ]
    beside = [benches[place] for place in places]
    members = [single.engine(*pair) for pair in zip(parts, beside, strict=True)]
    _fit(parts, teams.Apart(members), until, beside, teacher)


def _fit(
    parts: Sequence[single.Parts],
    team: teams.Team,
    until: int | None,
    benches: Sequence[single.Bench],
    teacher: single.Teacher | None,
) -> None:
    """Trains them in lockstep and writes what each leaves."""
    tracks = [own.track for own in parts]
    ends = loop.Fit(tracks, team, benches[0].guard, until).run()
    for own, bench, trained in zip(parts, benches, ends, strict=True):
        single.conclude(own, bench, teacher, trained, together=len(parts))


def _moved(teacher: single.Teacher | None, mesh: Mesh) -> single.Teacher | None:
    """The teacher on other devices."""
    if teacher is None:
        return None
    variables = state_lib.replicate(teacher.network.variables, mesh)
    network = dataclasses.replace(teacher.network, variables=variables)
    return dataclasses.replace(teacher, network=network)
