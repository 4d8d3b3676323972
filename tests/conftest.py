"""Every test sees eight CPU devices, strict shapes, and warnings as errors."""

import os
import pathlib

# Compilation takes most of the time of these tests, and their networks are tiny: so
# programs are compiled with little optimisation and kept between tests and runs. The
# programs that tests start inherit all of this.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
