"""The order of training examples as a pure function of (seed, step).

Any batch can be computed without the ones before it, so a resumed run continues with
the batch that would have come next.
"""

import functools

import numpy as np


def steps_per_epoch(examples: int, batch_size: int, drop_last: bool) -> int:
    """Returns the number of batches in an epoch of `examples` examples.

    Raises:
      ValueError: there would be no batches.
    """
    if examples < 1 or batch_size < 1:
        raise ValueError(f"{examples=} and {batch_size=} must be at least 1")
    steps = examples // batch_size if drop_last else -(-examples // batch_size)
    if not steps:
        raise ValueError(
            f"{batch_size=} is larger than {examples=} and drop_last is set"
        )
    return steps


def batch_indices(
    seed: int, step: int, examples: int, batch_size: int, drop_last: bool
) -> np.ndarray:
    """Returns the indices of the examples of one training step.

    Args:
      seed: the run's seed, any integer (taken modulo 2**64).
      step: number of the step, from 0 at the start of training.
      examples: size of the training split.
      batch_size: examples per step, over all devices.
      drop_last: whether to drop an epoch's incomplete last batch; otherwise it is
        returned as it is, shorter.

    Returns:
      int32 positions in the training split, at most `batch_size`; read-only.

    Raises:
      ValueError: a size below 1, a negative step, or an epoch without batches.
    """
    if step < 0:
        raise ValueError(f"{step=} must not be negative")
    epoch, batch = divmod(step, steps_per_epoch(examples, batch_size, drop_last))
    permutation = _permutation(seed, epoch, examples)
    return permutation[batch * batch_size : (batch + 1) * batch_size]


def filled(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the indices of a short batch, filled up to `batch_size` with -1."""
    return np.pad(rows, (0, batch_size - len(rows)), constant_values=-1)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    key = np.array([seed % 2**64, epoch], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    permutation = generator.permutation(np.arange(examples, dtype=np.int32))
    permutation.setflags(write=False)  # shared by all batches of the epoch
    return permutation
