"""The gates of a finished HME run: their entropies, for records and a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import models
from lakd_jax.hme import network, tree
from lakd_jax.interop import weights
from lakd_jax.report import table
from lakd_jax.store import workdir
from lakd_jax.training import state as state_lib

Entropies = dict[str, dict[str, Any]]  # by temperature: of each gate, and their mean


def measure(directory: Path) -> dict[str, Any]:
    """What the gates of a run's stage 1 say, and what they said before training."""
    loaded, card = weights.student(
        directory / workdir.STAGE1 / workdir.STUDENT, "float32"
    )
    variables: Any = loaded.variables
    drawn = untrained(card["result"]["seed"], loaded.model)
    return {
        "gates": {
            "stage1": entropies(variables["params"]),
            "untrained": entropies(drawn),
        }
    }


def entropies(params: Any) -> Entropies:
    """Normalised entropies of an HME's gates at the temperatures of a report."""
    found = [np.asarray(gate) for gate in network.gates(params)]
    told = [tree.conflict(found, tau) for tau in tree.TEMPERATURES]
    return {
        f"{t.temperature:g}": {"levels": list(t.levels), "mean": t.mean} for t in told
    }


def untrained(seed: int, like: Any) -> Any:
    """The parameters from which stage 1 began in a run of this seed.

    Gates are drawn like everything else, so that the arms of one seed share them.
    """
    key = jax.random.fold_in(jax.random.key(seed), state_lib.INITIALISE)
    own, _ = jax.random.split(key)  # the other half is the method's
    model = models.create("hme", num_classes=like.num_classes, layout=like.layout)
    images = jnp.zeros((1, 32, 32, 3))
    return model.init(own, images, train=False)["params"]


def render(kept: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A line an arm, "mean +- sd (n)" over its seeds, all of stage 1."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, record in kept:
        groups.setdefault(name, []).append(record)
    taus = [f"{tau:g}" for tau in tree.TEMPERATURES]
    lines = [["method", "test %", *(f"entropy, tau {tau}" for tau in taus)]]
    lines[0] += [f"gate {k}, tau {taus[0]}" for k in (1, 2, 3)]
    first = next(iter(groups.values()))
    lines.append(["untrained", "-", *_gates([r["gates"]["untrained"] for r in first])])
    for name, group in groups.items():
        right = [r["result"]["stage1"]["test_last"]["accuracy"] for r in group]
        own = _gates([r["gates"]["stage1"] for r in group])
        lines.append([name, _spread([100 * r for r in right], 2), *own])
    return table.grid(lines[0], lines[1:], [0])


def _gates(told: Sequence[Entropies]) -> list[str]:
    means = [[t[tau]["mean"] for t in told] for tau in told[0]]
    first = next(iter(told[0]))
    levels = zip(*(t[first]["levels"] for t in told), strict=True)
    return [_spread(values, 4) for values in (*means, *levels)]


def _spread(values: Sequence[float], digits: int) -> str:
    mean, deviation, count = table.summarise(values)
    middle = "" if deviation is None else f" +- {deviation:.{digits}f}"
    return f"{mean:.{digits}f}{middle} ({count})"
