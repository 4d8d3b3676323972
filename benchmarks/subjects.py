"""Makes what is measured, by name. A library is imported when it is needed.

This module imports no JAX, so that a process of a peer has none.
"""

import os
from collections.abc import Sequence

from benchmarks import timing
from benchmarks import work as work_lib

OURS = "ours"
# What --peer takes, and the subjects that it stands for.
PEERS = {
    "torch": ("torch eager", "torch compile"),
    "torch-eager": ("torch eager",),
    "torch-compile": ("torch compile",),
    "torch-cudagraphs": ("torch cudagraphs",),
    "torchdistill": ("torchdistill",),
    "mdistiller": ("mdistiller",),
    "keras": ("keras",),
}
# Those that may fail without ending a measurement: torch.compile needs a C++ compiler.
COMPILED = ("torch compile", "torch cudagraphs")
_METHODS = {"torch": ("none", "kd", "lakd"), "keras": ("kd",)}
_OF_LIBRARIES = ("none", "kd")


def names(peers: Sequence[str], method: str) -> list[str]:
    """Returns ours and the subjects of `peers` that have this method."""
    found = [name for peer in peers for name in PEERS[peer]]
    has = {name: _METHODS.get(name.split()[0], _OF_LIBRARIES) for name in found}
    return [OURS, *(name for name in dict.fromkeys(found) if method in has[name])]


def make(name: str, work: work_lib.Work, checkout: str) -> timing.Subject:
    """Returns a subject other than ours, after its first step.

    Args:
      name: one of those that `names` returns.
      work: what it trains.
      checkout: mdistiller's folder.

    Raises:
      timing.Unusable: its library is missing or cannot do this.
    """
    if name == "keras":
        os.environ.setdefault("KERAS_BACKEND", "jax")  # before it is imported
        from benchmarks import keras_step

        return keras_step.Keras(work)
    from benchmarks import peers, torch_step

    torch_step.prepare(threads(), work.seed)
    if name == "torchdistill":
        return peers.Torchdistill(work)
    if name == "mdistiller":
        return peers.Mdistiller(work, checkout)
    return torch_step.Torch(work, name.removeprefix("torch "))


def threads() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
