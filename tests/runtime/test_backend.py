"""Settings for the device: they must change the speed only."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax.runtime import backend


@pytest.fixture
def fresh_options():
    backend.compiler_options.cache_clear()
    yield
    backend.compiler_options.cache_clear()


def kernel_gradient(x, kernel):
    def loss(kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.square(y))

    return jax.grad(loss)(kernel)


def test_options_keep_convolutions_and_values(fresh_options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 8, 8, 32)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 32, 32)).astype(np.float32)
    lowered = jax.jit(kernel_gradient).lower(x, kernel)
    options = backend.compiler_options()
    ours = lowered.compile(compiler_options=options)
    plain = lowered.compile()
    assert options, "this XLA refuses the options that make steps faster"
    assert "convolution(" in ours.as_text()
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), rtol=2e-5, atol=1e-2)


def test_options_that_xla_does_not_know_are_left_out(fresh_options, monkeypatch):
    monkeypatch.setattr(backend, "_CPU_OPTIONS", {"xla_cpu_no_such_option": True})
    assert backend.compiler_options() == {}


def test_a_configured_cache_takes_precedence(tmp_path):
    cache_dir = jax.config.jax_compilation_cache_dir
    assert cache_dir  # by conftest
    backend.prepare(str(tmp_path / "other"))
    assert jax.config.jax_compilation_cache_dir == cache_dir


START = """
import sys, jax
from lakd_jax.runtime import backend
backend.prepare(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))
"""


@pytest.mark.parametrize("cache", ["compiled", ""])
def test_programs_are_kept_in_the_cache(tmp_path, cache):
    environment = dict(os.environ)
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])
    command = [sys.executable, "-c", START, cache]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    assert bool(list(tmp_path.rglob("*-cache"))) == bool(cache)


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    remark = backend._unwritable(str(tmp_path / "file" / "cache"))
    assert remark.startswith("compile_cache: ") and "set it to another" in remark
    assert backend._unwritable(str(tmp_path / "new" / "cache")) == ""
