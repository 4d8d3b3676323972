"""Batch norms that leave out the rows that fill up a short batch."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def norms_over(valid: jax.Array | None) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which batch norms take statistics of some examples only.

    It holds for every `nn.BatchNorm` in training mode that is traced inside, whoever
    calls it, so that networks and methods need not pass `valid` on. Other layers treat
    examples one by one; what the rows left out contain does not matter, as long as it
    is finite.

    Args:
      valid: (B,) bool, the examples that count; None for all.

    Raises:
      ValueError: on entering a norm whose input has another first axis than B.
    """
    if valid is None:
        return contextlib.nullcontext()

    def masked(
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        norm = context.module
        is_norm = isinstance(norm, nn.BatchNorm) and context.method_name == "__call__"
        if not is_norm or norm.use_running_average:
            return call(*arguments, **options)
        x = arguments[0]
        if len(x) != len(valid):
            raise ValueError(
                f"a batch norm of {len(x)} rows in a batch of {len(valid)}"
            )
        mask = jnp.expand_dims(valid, tuple(range(1, x.ndim)))
        return call(*arguments, **options, mask=mask)

    return nn.intercept_methods(masked)
