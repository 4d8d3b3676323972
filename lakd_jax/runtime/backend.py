"""What is set for each kind of device before programs are compiled and run there.

Measured with `python -m benchmarks.step`; RESULTS.md has the figures.
"""

import ctypes
import functools
import os
import platform
from typing import Any

import jax

from lakd_jax import paths

# glibc's mallopt: what its parameters are called in malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MIB = 1 << 20

# XLA's CPU compiler may hand convolutions to YNNPACK, whose gradients of kernels
# are slower than Eigen's; sums and matrix products it does well.
_CPU_OPTIONS: Any = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_DOT"
    )
}


def on_cpu() -> bool:
    """Whether programs run on the host's processor."""
    return jax.default_backend() == "cpu"


def prepare(cache: str) -> None:
    """Settings of the process; starts JAX.

    Args:
      cache: directory in which compiled programs are kept between runs, made where it
        is missing; "" for none; a URL is left to JAX. What JAX was told already
        (JAX_COMPILATION_CACHE_DIR) stays.
    """
    settings: Any = jax.config
    if cache and not settings.jax_compilation_cache_dir:
        if "://" not in cache:
            # Absolute, as a relative one would follow a change of directory.
            cache = os.path.abspath(paths.local(cache, "compile_cache"))
        jax.config.update("jax_compilation_cache_dir", cache)
    if on_cpu():
        _keep_memory()


@functools.cache
def compiler_options() -> dict[str, Any]:
    """For `lowered.compile(compiler_options=...)` of programs that run often."""
    if not on_cpu():
        return {}
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options=_CPU_OPTIONS)
    except jax.errors.JaxRuntimeError:  # another version of XLA: an option is gone
        return {}
    return _CPU_OPTIONS


def _keep_memory() -> None:
    """Has the C library keep freed memory instead of handing it back.

    A training step on the CPU takes and frees hundreds of megabytes. glibc maps such
    pieces afresh each time, and the first touch of every page is a page fault: up to
    a third of a step on a virtual machine. Where there is no glibc, nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2047 * _MIB)
    mallopt(_TOP_PAD, 64 * _MIB)
