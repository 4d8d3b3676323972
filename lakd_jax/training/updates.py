"""Logs how far the weights of each stage move: `log_updates`.

A stage is represented by the largest kernel of its last block (the last one of equal
size), which produces its feature or, in bottlenecks, the input of the layer that does.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax.models import chain
from lakd_jax.training import state as state_lib

PyTree = Any


def metric(stage: int) -> str:
    """Returns the name of a stage's metric; stages are counted from 1."""
    return f"stage{stage}/update_norm"


def kernels(model: chain.Chain, tree: PyTree) -> dict[str, Any]:
    """Returns the kernel of each stage in `tree`, by the name of the metric.

    Args:
      model: the student.
      tree: its parameters, or their gradients or updates, or those of some units.
    """
    found = {}
    for stage, size in enumerate(model.stage_sizes, 1):
        block = tree.get(f"stage{stage}", {}).get(f"block{size}", {})
        leaves: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(block)
        paths = [path for path in leaves if path[-1] == "kernel"]
        if paths:
            largest = max(paths, key=lambda path: (math.prod(leaves[path].shape), path))
            found[metric(stage)] = leaves[largest]
    return found


def norms(model: chain.Chain, updates: PyTree) -> dict[str, jax.Array]:
    """Returns the L2 norm of the update of each stage's kernel, see `kernels`."""
    found = kernels(model, updates)
    return {name: jnp.sqrt(jnp.sum(jnp.square(x))) for name, x in found.items()}


def first_norms(model: chain.Chain, state: state_lib.TrainState) -> dict[str, float]:
    """Returns the L2 norm of each stage's kernel in the first state; 1 for zeros."""
    found = jax.device_get(kernels(model, state.params["student"]))
    return {name: float(np.linalg.norm(x.ravel())) or 1.0 for name, x in found.items()}


def distances(
    records: Iterable[Mapping[str, Any]], name: str, steps: Iterable[int]
) -> list[float] | None:
    """Returns how far a kernel had moved after each of `steps`; None if not logged.

    The sum of the norms of all updates, relative to the kernel's first norm. Lines of
    metrics have means over the steps since the line before.

    Args:
      records: of metrics.jsonl, oldest first.
      name: of the metric.
      steps: numbers of completed steps.
    """
    ends, travelled = [0], [0.0]
    for record in records:
        if record["kind"] == "train" and name in record:
            passed = record["step"] - ends[-1]
            travelled.append(travelled[-1] + record[name] * passed)
            ends.append(record["step"])
    if len(ends) == 1:
        return None
    return [float(np.interp(step, ends, travelled)) for step in steps]
