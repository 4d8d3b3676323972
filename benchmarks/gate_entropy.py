"""The gates of a finished HME run: their entropies, for records and a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import models
from lakd_jax.data import device
from lakd_jax.hme import network, tree
from lakd_jax.interop import weights
from lakd_jax.report import table
from lakd_jax.store import workdir

# By temperature: the entropy of each gate, and their mean.
Entropies = dict[str, dict[str, Any]]


def measure(directory: Path) -> dict[str, Any]:
    """Computes the entropies of a run's gates after stage 1 and before training."""
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
    """Computes normalised entropies of an HME's gates at a report's temperatures."""
    found = [np.asarray(gate) for gate in network.gates(params)]
    levels = {tau: tree.conflict(found, tau) for tau in tree.TEMPERATURES}
    return {
        f"{tau:g}": {"levels": each, "mean": float(np.mean(each))}
        for tau, each in levels.items()
    }


def untrained(seed: int, like: Any) -> Any:
    """Returns the parameters from which stage 1 began in a run of this seed.

    Gates are initialised from the seed alone, so the arms of one seed share them.
    """
    key = jax.random.fold_in(jax.random.key(seed), device.INITIALISE)
    student_key, _ = jax.random.split(key)  # the other half is the method's
    model = models.create("hme", num_classes=like.num_classes, layout=like.layout)
    images = jnp.zeros((1, 32, 32, 3))
    return model.init(student_key, images, train=False)["params"]


def render(kept: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Returns one line per arm, "mean +- sd (n)" over its seeds, all of stage 1."""
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
        gates = _gates([r["gates"]["stage1"] for r in group])
        lines.append([name, _spread([100 * r for r in right], 2), *gates])
    return table.grid(lines[0], lines[1:], [0])


def _gates(runs: Sequence[Entropies]) -> list[str]:
    means = [[run[tau]["mean"] for run in runs] for tau in runs[0]]
    first = next(iter(runs[0]))
    levels = zip(*(run[first]["levels"] for run in runs), strict=True)
    return [_spread(values, 4) for values in (*means, *levels)]


def _spread(values: Sequence[float], digits: int) -> str:
    mean, deviation, count = table.summarise(values)
    middle = "" if deviation is None else f" +- {deviation:.{digits}f}"
    return f"{mean:.{digits}f}{middle} ({count})"
