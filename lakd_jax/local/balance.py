"""Where to cut a student so that its modules cost alike.

For memory the modules' activations should be equal, for a pipeline their operations:
in CIFAR ResNets the first stage has four times the activations of the last and the same
number of operations, so the two differ much.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax.models import chain

KINDS = ("bytes", "flops")


def unit_costs(model: chain.Chain, kind: str) -> tuple[float, ...]:
    """What each unit of a network costs for one image of the family's own size.

    Args:
      kind: `bytes`, of what is kept from the forward pass in training mode for the
        backward pass; `flops`, of the forward pass, as XLA counts them.

    Returns:
      One number a unit, in the order of `model.unit_names`; the head is left out.
    """
    network: Any = model  # a Linen module is hashable, though its type does not say so
    return _unit_costs(network, kind)


@functools.cache
def _unit_costs(model: Any, kind: str) -> tuple[float, ...]:
    side = model.IMAGE_SIZE
    variables = chain.variable_shapes(model, side)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    costs, seen = [], {}  # most blocks of a stage are alike, and tracing takes time
    for after, until in itertools.pairwise(("", *model.unit_names)):

        def unit(variables: Any, x: jax.Array, a: str = after, u: str = until) -> Any:
            outputs, _ = model.apply(
                variables, x, train=True, after=a, until=u, mutable=["batch_stats"]
            )
            blocks = list(itertools.chain(*outputs.blocks))
            return blocks[-1] if blocks else outputs.stem

        alike = (x.shape, *_shapes_of(variables["params"], until))
        if alike not in seen:
            cost = _MEASURES[kind](unit, variables, x)
            seen[alike] = cost, jax.eval_shape(unit, variables, x)
        cost, x = seen[alike]
        costs.append(cost)
    return tuple(costs)


def _shapes_of(params: Any, unit: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a unit's parameters."""
    for name in unit.split("."):
        params = params[name]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]


def _bytes(unit: Any, variables: Any, x: Any) -> float:
    def kept(batch: int) -> int:
        images = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
        back = jax.eval_shape(lambda v, x: jax.vjp(unit, v, x)[1], variables, images)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    return kept(2) - kept(1)  # what does not grow with the batch is weights


def _flops(unit: Any, variables: Any, x: Any) -> float:
    counted: Any = jax.jit(unit).lower(variables, x).cost_analysis()
    return counted["flops"]


_MEASURES = {"bytes": _bytes, "flops": _flops}


def split(costs: Sequence[float], ends: Sequence[int], count: int) -> list[int]:
    """The ends of `count` runs of neighbours whose dearest is as cheap as can be.

    Args:
      costs: of the units in order.
      ends: places at which a run may end, in order; the last is that of the last unit.
      count: of runs.

    Returns:
      `count` of `ends`, the last included.

    Raises:
      ValueError: there are fewer places than runs.
    """
    if count > len(ends):
        raise ValueError(
            f"only {len(ends)} modules are possible, {count} are asked for"
        )
    total = [0.0, *itertools.accumulate(costs)]
    start = [0, *(end + 1 for end in ends)]  # of the run behind each place
    # best[j]: (dearest run, ends) of the units up to ends[j - 1] in so many runs
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(float("inf"), [])] * len(ends)
    for _ in range(count):
        new: list[tuple[float, list[int]]] = [(float("inf"), [])] * (len(ends) + 1)
        for j, end in enumerate(ends, 1):
            for i in range(j):
                dearest = max(best[i][0], total[end + 1] - total[start[i]])
                if dearest < new[j][0]:
                    new[j] = dearest, [*best[i][1], end]
        best = new
    return best[-1][1]
