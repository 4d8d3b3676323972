"""Balances the cost of a student's modules.

To save memory the modules' activations should be equal, for a pipeline their
operations. The two differ: in CIFAR ResNets the first stage has four times the
activations of the last and the same number of operations.
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax.models import chain

KINDS = ("bytes", "flops")


def unit_costs(model: chain.Chain, kind: str) -> tuple[float, ...]:
    """Computes the cost of each unit for one image.

    Its size is the one that the network is made for, else the family's `IMAGE_SIZE`.

    Args:
      model: the network.
      kind: `bytes` that the forward pass in training mode stores for the backward
        pass, or `flops` of the forward pass, as counted by XLA.

    Returns:
      One number per unit, in the order of `model.unit_names`, without the head.
    """
    network: Any = model  # Linen modules are hashable, though not to type checkers
    return _unit_costs(network, kind)


@functools.cache
def _unit_costs(model: Any, kind: str) -> tuple[float, ...]:
    side = model.fixed_side or model.IMAGE_SIZE
    variables = chain.variable_shapes(model, side)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    costs, cache = [], {}  # most blocks of a stage are alike, and tracing takes time
    for after, until in itertools.pairwise(("", *model.unit_names)):

        def unit(variables: Any, x: jax.Array, a: str = after, u: str = until) -> Any:
            outputs, _ = model.apply(
                variables, x, train=True, after=a, until=u, mutable=["batch_stats"]
            )
            blocks = list(itertools.chain(*outputs.blocks))
            return blocks[-1] if blocks else outputs.stem

        path = until.split(".")
        params = functools.reduce(operator.getitem, path, variables["params"])
        key = str(jax.tree.map(jnp.shape, (x, params)))
        if key not in cache:
            cost = _MEASURES[kind](unit, variables, x)
            cache[key] = cost, jax.eval_shape(unit, variables, x)
        cost, x = cache[key]
        costs.append(cost)
    return tuple(costs)


def _bytes(unit: Any, variables: Any, x: Any) -> float:
    def residual_bytes(batch: int) -> int:
        images = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
        pullback = jax.eval_shape(
            lambda v, x: jax.vjp(unit, v, x)[1], variables, images
        )
        leaves = jax.tree.leaves(pullback)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return residual_bytes(2) - residual_bytes(1)  # the constant part is weights


def _flops(unit: Any, variables: Any, x: Any) -> float:
    analysis: Any = jax.jit(unit).lower(variables, x).cost_analysis()
    return analysis["flops"]


_MEASURES = {"bytes": _bytes, "flops": _flops}


def split(costs: Sequence[float], ends: Sequence[int], count: int) -> list[int]:
    """Partitions units into `count` contiguous groups, minimising the largest cost.

    Args:
      costs: cost of each unit, in order.
      ends: indices of the units that may end a group, ascending; the last is that of
        the last unit.
      count: number of groups.

    Returns:
      The last unit of each group: `count` of `ends`, including the last.

    Raises:
      ValueError: `ends` has fewer than `count` entries.
    """
    if count > len(ends):
        raise ValueError(
            f"only {len(ends)} modules are possible, but {count} are requested"
        )
    total = [0.0, *itertools.accumulate(costs)]
    start = [0, *(end + 1 for end in ends)]  # of the group after each end
    # best[j]: (largest cost, ends) for the units up to ends[j - 1], after n iterations
    # in n groups
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(float("inf"), [])] * len(ends)
    for _ in range(count):
        new: list[tuple[float, list[int]]] = [(float("inf"), [])] * (len(ends) + 1)
        for j, end in enumerate(ends, 1):
            for i in range(j):
                largest = max(best[i][0], total[end + 1] - total[start[i]])
                if largest < new[j][0]:
                    new[j] = largest, [*best[i][1], end]
        best = new
    return best[-1][1]
