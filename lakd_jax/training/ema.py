"""The exponential moving average of a student, as timm's ModelEmaV3 computes it.

Source: timm 1.0. Parameters and collections such as batch statistics are averaged alike
after every update; arrays of integers are copied. The first update copies everything,
so the random first weights have no part in the average.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
_POWER = 2 / 3  # of the warm-up, timm's default


@dataclasses.dataclass(frozen=True)
class Average:
    """How an average is updated.

    Attributes:
      decay: the share of the average that an update keeps, from 0 to below 1.
      warmup: whether it grows from 0 to `decay`, as 1 - (1 + updates)^(-2/3).
    """

    decay: float
    warmup: bool = False

    def decay_at(self, step: Any) -> jax.Array:
        """Returns the share that step number `step`, from 0, keeps."""
        step = jnp.asarray(step, jnp.float32)
        decay = jnp.full_like(step, self.decay)
        if self.warmup:
            decay = jnp.minimum(decay, 1.0 - (1.0 + step) ** -_POWER)
        return jnp.where(step > 0, decay, 0.0)

    def updated(
        self,
        average: Mapping[str, PyTree],
        step: jax.Array,
        variables: Mapping[str, PyTree],
    ) -> dict[str, PyTree]:
        """Returns the average after step number `step`, counted from 0.

        Args:
          average: the average before, in the form of `of`.
          step: as in the state before the step.
          variables: parameters and collections after the step, by kind, as in `of`.
        """
        decay = self.decay_at(step)

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(new.dtype, jnp.floating):
                return new
            return (decay * old + (1 - decay) * new).astype(new.dtype)

        def student(kind: str, tree: PyTree) -> PyTree:
            return jax.tree.map(mean, tree["student"], variables[kind]["student"])

        return {
            kind: {**tree, "student": student(kind, tree)}
            for kind, tree in average.items()
        }


def of(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns the student's part of `{kind: {"student": ..., "method": ...}}`."""
    return {
        kind: {"student": tree["student"]}
        for kind, tree in variables.items()
        if tree["student"]
    }
