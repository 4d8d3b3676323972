"""Settings for compiling and running programs on each kind of device.

Measured with `python -m benchmarks.step`; RESULTS.md has the figures.
"""

import ctypes
import functools
import os
import platform
from typing import Any

import jax
from jax.sharding import Mesh

from lakd_jax import paths
from lakd_jax.runtime import interrupt

# Parameters of glibc's mallopt, named as in malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MIB = 1 << 20

# XLA's CPU compiler may use YNNPACK for convolutions, whose kernel gradients are
# slower than Eigen's; it is used for sums and matrix products only.
_CPU_OPTIONS: Any = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_DOT"
    )
}


def on_cpu(mesh: Mesh) -> bool:
    """Returns whether programs for the devices of `mesh` run on the CPU.

    They may be described devices, for which this process only compiles.
    """
    return mesh.devices.flat[0].platform == "cpu"


def prepare(cache: str) -> str:
    """Applies the settings of the process; initialises JAX.

    Args:
      cache: directory in which compiled programs are kept between runs, created if
        absent; "" for none; a URL is passed to JAX. A directory that is already
        configured (JAX_COMPILATION_CACHE_DIR) takes precedence.

    Returns:
      A remark if programs cannot be kept there, "" otherwise.
    """
    settings: Any = jax.config
    remark = ""
    if cache and not settings.jax_compilation_cache_dir:
        if "://" not in cache:
            # Absolute, since a relative path would depend on the current directory.
            cache = os.path.abspath(paths.local(cache, "compile_cache"))
            remark = _unwritable(cache)
        if not remark:
            jax.config.update("jax_compilation_cache_dir", cache)
    if jax.default_backend() == "cpu":
        _keep_memory()
    return remark


def _unwritable(folder: str) -> str:
    """Describes why a folder cannot be made or written; "" if it can."""
    existing = folder
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if os.path.isdir(existing) and os.access(existing, os.W_OK):
        return ""
    return (
        f"compile_cache: {folder} cannot be written, so that compiled programs are not "
        "kept: set it to another folder, or to empty"
    )


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Returns the options of `lowered.compile` for programs that run often."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options=_CPU_OPTIONS)
    except jax.errors.JaxRuntimeError:  # another version of XLA, without the option
        return {}
    return _CPU_OPTIONS


def compiled(lowered: Any, guard: interrupt.Guard) -> Any:
    """Compiles a program that runs often; signals end the process meanwhile."""
    with guard.released():
        return lowered.compile(compiler_options=compiler_options())


def _keep_memory() -> None:
    """Makes the C library keep freed memory instead of returning it to the system.

    A training step on CPU allocates and frees hundreds of megabytes. glibc maps large
    blocks anew each time, and the first access to every page is a page fault: up to a
    third of a step on a virtual machine. Does nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2047 * _MIB)
    mallopt(_TOP_PAD, 64 * _MIB)
