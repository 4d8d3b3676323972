"""The training state, carried from step to step."""

from collections.abc import Mapping
from typing import Any

import flax
import jax

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """The training state, with one subtree per part: `{"student": ..., "method": ...}`.

    Attributes:
      step: the number of completed updates, int32 scalar.
      params: the float32 parameters of the student and of the method.
      collections: their mutable collections, such as "batch_stats", keyed by the Linen
        name.
      opt_state: the state of the optimiser over `params`.
      average: the moving average of the student, `{"params": {"student": ...}, ...}`,
        see `ema`; {} if there is none.
    """

    step: jax.Array
    params: PyTree
    collections: dict[str, PyTree]
    opt_state: PyTree
    average: dict[str, PyTree] = flax.struct.field(default_factory=dict)

    def to_tree(self) -> dict[str, PyTree]:
        """Returns the tree stored in checkpoints, with collections at the top level."""
        fields = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        if self.average:
            fields["average"] = self.average
        return fields | self.collections

    @classmethod
    def from_tree(cls, tree: Mapping[str, PyTree]) -> "TrainState":
        """Inverts `to_tree`."""
        collections = dict(tree)
        names = ("step", "params", "opt_state")
        step, params, opt_state = (collections.pop(name) for name in names)
        average = collections.pop("average", {})
        return cls(step, params, collections, opt_state, average)

    def variables(self, part: str) -> dict[str, PyTree]:
        """Returns the variables of "student" or "method" for Linen's `apply`."""
        kinds = {"params": self.params} | self.collections
        return {kind: tree[part] for kind, tree in kinds.items()}

    def average_variables(self) -> dict[str, PyTree]:
        """Returns the averaged variables of the student; those without are not it."""
        averaged = {kind: tree["student"] for kind, tree in self.average.items()}
        return self.variables("student") | averaged


def parameter_count(params: PyTree) -> int:
    """Returns the number of scalar parameters in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))
