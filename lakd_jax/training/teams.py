"""How the steps of several seeds are executed: one beside another, or as one program.

A single run is a team of one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax.training import engine as engine_lib
from lakd_jax.training import modules, spec, step
from lakd_jax.training import state as state_lib

PyTree = Any


class Team(Protocol):
    """What the training loop asks for; every list has one entry a seed."""

    def load(self, states: Sequence[state_lib.TrainState]) -> None:
        """Starts from `states`, which must not be used afterwards."""
        ...

    def run(self, rows: Sequence[np.ndarray]) -> Any:
        """One step for each row of each (n, B); returns at once, what `read` takes."""
        ...

    def read(self, told: Any) -> list[dict[str, Any]]:
        """Waits for the metrics, (n,) each on the host, of what `run` started."""
        ...

    def states(self) -> Sequence[state_lib.TrainState]:
        """The whole states after all steps so far; valid until the next `run`."""
        ...

    def costs(self) -> engine_lib.Costs:
        """Of the last step that ran."""
        ...

    def close(self) -> None:
        """Lets go of what reads data ahead."""
        ...


class Apart:
    """An engine a seed; on devices of their own they work at the same time."""

    def __init__(self, members: Sequence[engine_lib.Engine]):
        self._members = members

    def load(self, states: Sequence[state_lib.TrainState]) -> None:
        """See `Team`."""
        for engine, state in zip(self._members, states, strict=True):
            engine.load(state)

    def run(self, rows: Sequence[np.ndarray]) -> Any:
        """See `Team`."""
        return [e.run(own) for e, own in zip(self._members, rows, strict=True)]

    def read(self, told: Any) -> list[dict[str, Any]]:
        """See `Team`."""
        return [modules.together(own) for own in jax.device_get(told)]

    def states(self) -> Sequence[state_lib.TrainState]:
        """See `Team`."""
        return [engine.state() for engine in self._members]

    def costs(self) -> engine_lib.Costs:
        """See `Team`; of one seed."""
        return self._members[0].costs()

    def close(self) -> None:
        """See `Team`."""
        for engine in self._members:
            engine.close()


class Stacked:
    """One program for all seeds: `jax.vmap` of `step.run_steps`.

    The teacher and the images are shared; states, keys and the order of the images
    are stacked.
    """

    def __init__(
        self,
        learner: spec.Learner,
        teacher_variables: PyTree,
        data: Sequence[state_lib.Resident],
        compile_with: engine_lib.CompileWith,
    ):
        """`data` differ by their keys alone."""

        def run_all(
            states: state_lib.TrainState,
            teacher: PyTree,
            stacked: state_lib.Resident,
            rows: jax.Array,
        ) -> tuple[state_lib.TrainState, spec.Metrics]:
            def run_one(state: Any, key: jax.Array, noise: jax.Array, own: Any) -> Any:
                keyed = dataclasses.replace(stacked, key=key, noise=noise)
                return step.run_steps(learner, state, teacher, keyed, own)

            return jax.vmap(run_one)(states, stacked.key, stacked.noise, rows)

        stacked = dataclasses.replace(
            data[0],
            key=jnp.stack([own.key for own in data]),
            noise=jnp.stack([own.noise for own in data]),
        )
        self._count = len(data)
        self._engine = engine_lib.Fused(
            learner, teacher_variables, stacked, compile_with, run_all
        )

    def load(self, states: Sequence[state_lib.TrainState]) -> None:
        """See `Team`."""
        self._engine.load(jax.tree.map(lambda *own: jnp.stack(own), *states))

    def run(self, rows: Sequence[np.ndarray]) -> Any:
        """See `Team`."""
        return self._engine.run(np.stack(rows))

    def read(self, told: Any) -> list[dict[str, Any]]:
        """See `Team`."""
        whole = modules.together(jax.device_get(told))
        return [{n: v[i] for n, v in whole.items()} for i in range(self._count)]

    def states(self) -> Sequence[state_lib.TrainState]:
        """See `Team`."""
        whole = self._engine.state()
        return [jax.tree.map(lambda x, i=i: x[i], whole) for i in range(self._count)]

    def costs(self) -> engine_lib.Costs:
        """See `Team`; of all seeds together."""
        return self._engine.costs()

    def close(self) -> None:
        """See `Team`."""
        self._engine.close()
