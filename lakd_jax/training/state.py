"""What training carries from step to step."""

from collections.abc import Mapping
from typing import Any

import flax
import jax

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """One subtree per network part: `{"student": ..., "method": ...}`.

    Attributes:
      step: finished updates, int32 scalar.
      params: float32 parameters of the student and of the method.
      collections: the mutable collections that the two have, such as "batch_stats",
        by their names in Linen.
      opt_state: of the optimiser over `params`.
    """

    step: jax.Array
    params: PyTree
    collections: dict[str, PyTree]
    opt_state: PyTree

    def to_tree(self) -> dict[str, PyTree]:
        """Returns what checkpoints hold: collections stand beside the parameters."""
        fixed = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return fixed | self.collections

    @classmethod
    def from_tree(cls, tree: Mapping[str, PyTree]) -> "TrainState":
        """Returns the state of which `to_tree` made `tree`."""
        collections = dict(tree)
        fixed = [collections.pop(name) for name in ("step", "params", "opt_state")]
        step, params, opt_state = fixed
        return cls(step, params, collections, opt_state)

    def variables(self, part: str) -> dict[str, PyTree]:
        """Returns those of "student" or "method", as Linen's `apply` takes them."""
        kinds = {"params": self.params} | self.collections
        return {kind: tree[part] for kind, tree in kinds.items()}


def parameter_count(params: PyTree) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(x.size for x in jax.tree.leaves(params))
