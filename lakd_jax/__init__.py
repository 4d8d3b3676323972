"""Knowledge distillation for image classifiers in JAX and Flax.

    import lakd_jax
    config = lakd_jax.config.default()
    run = lakd_jax.train(config, "runs/mine")   # goes on where it was stopped
    run = lakd_jax.load("runs/mine")            # the same, later
    logits = run(images)                        # uint8 (N, H, W, 3)

docs/quickstart.md shows more of it, docs/your_own.md how to bring networks, data and
methods of your own (`lakd_jax.register`), and teachers (`lakd_jax.teacher_from`).
"""

import importlib
from typing import Any

from lakd_jax.version import VERSION as __version__

__all__ = ["__version__", "config", "load", "register", "teacher_from", "train"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `import lakd_jax` alone is quick and starts no JAX."""
    if name in ("load", "train"):
        return getattr(importlib.import_module("lakd_jax.api"), name)
    if name == "teacher_from":
        return importlib.import_module("lakd_jax.register").teacher_from
    if name in __all__:
        return importlib.import_module(f"lakd_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
