"""How programs are compiled in tests; to be read before JAX is imported."""

import importlib.metadata
import os

DEVICES = 8
# Compilation takes most of the time of these tests, and their networks are tiny.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The emitters of fused loops take half of the time; later ones have no choice.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


def prepare():
    """Has JAX, and the programs that tests start, compile with little optimisation."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["XLA_FLAGS"] = FLAGS
