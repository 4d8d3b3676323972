"""What several seeds in one program cost, against one: in turn, in one process.

    python -m benchmarks.seeds --pair=resnet56,resnet20 --method=kd --seeds=5

Random images of 32x32. A step of the team (`lakd_jax.training.teams.Stacked`) makes one
of
each seed; the ratio says how many times longer that takes than the step of one. Where
it is below the number of seeds, the program is faster than training them in turn.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import ours, timing
from lakd_jax import distill
from lakd_jax.runtime import backend
from lakd_jax.training import engine, teams
from lakd_jax.training import state as state_lib


class Seeds:
    """A team's steps, for `timing.interleaved`.

    Attributes:
      name, facts: see `timing.Subject`.
    """

    def __init__(self, name: str, made: ours.Setup, team: teams.Team, count: int):
        self.name, self.facts = name, {}
        self._team = team
        team.load([state_lib.replicate(made.state, made.learner.mesh)] * count)
        self._rows = [made.rows(self._several(made), seed) for seed in range(count)]
        self.run(1)

    def _several(self, made: ours.Setup) -> int:
        return 1 if backend.on_cpu() else made.config.steps_per_dispatch or 50

    def run(self, steps: int) -> None:
        """At least `steps` of each seed: whole dispatches."""
        told: Any = None
        for _ in range(-(-steps // self._rows[0].shape[0])):
            told = self._team.run(self._rows)
        jax.block_until_ready((told, self._team.states()))

    def peak_bytes(self) -> int | None:
        """See `timing.Subject`."""
        return None


def subjects(made: ours.Setup, count: int) -> list[Seeds]:
    """One seed, and `count` of them in one program."""
    keyed = [
        state_lib.rekeyed(made.resident, seed, made.learner.mesh)
        for seed in range(count)
    ]

    def compile_now(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    shared = (made.learner, made.teacher)
    alone = teams.Apart([engine.Fused(*shared, keyed[0], compile_now)])
    return [
        Seeds("1 seed", made, alone, 1),
        Seeds(
            f"{count} seeds", made, teams.Stacked(*shared, keyed, compile_now), count
        ),
    ]


def main() -> None:
    """Prints milliseconds of a step of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="resnet56,resnet20")
    parser.add_argument("--method", default="kd", choices=distill.names())
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", default=10, type=int)
    parser.add_argument("--steps", default=1, type=int, help="of each seed in a round")
    chosen = parser.parse_args()
    backend.prepare(cache="")
    config = ours.configure(
        *chosen.pair.split(","), chosen.method, chosen.batch, chosen.dtype
    )
    compared = subjects(ours.setup(config), chosen.seeds)
    times = timing.interleaved(
        compared, rounds=chosen.rounds, steps=chosen.steps, warm_up=2
    )
    for name, seconds in times.items():
        print(f"{name:10} {1000 * float(np.median(seconds)):8.2f} ms a step")
    ratio = timing.ratios(times, of="1 seed")[compared[1].name]
    print(
        f"{compared[1].name} take {ratio['median']:.2f} times as long as one "
        f"({ratio['q1']:.2f} to {ratio['q3']:.2f}), on {jax.devices()[0].device_kind}"
    )


if __name__ == "__main__":
    main()
