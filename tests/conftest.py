"""Every test sees eight CPU devices, strict shapes, and warnings as errors."""

import os
import pathlib
import shutil
import signal

import compilation

compilation.prepare()
# Programs are kept between tests and runs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
)

import jax  # noqa: E402
import pytest  # noqa: E402
import states  # noqa: E402
import tiny  # noqa: E402

from lakd_jax import cli  # noqa: E402
from lakd_jax.store import checkpoint  # noqa: E402

jax.config.update("jax_num_cpu_devices", compilation.DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Without it a worker keeps every program of every module: several GiB."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory):
    """A folder with checkpoints 1 and 2, only to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with checkpoint.Checkpointer(folder, keep=3) as saver:
        saver.save(1, states.make_state(1), extra={"epoch": 1})
        saver.save(2, states.make_state(2), extra={"epoch": 2})
    return folder


@pytest.fixture(scope="module")
def tiny_data():
    """Runs of the module find `tiny.dataset`, on one device."""
    with tiny.environment():
        yield


@pytest.fixture
def copied(two_steps, tmp_path):
    return pathlib.Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


@pytest.fixture
def main(capfd):
    """Calls `cli.main`; gives (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGINT)

    def run(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in args])
        return caught.value.code, *capfd.readouterr()

    yield run
    signal.signal(signal.SIGINT, handler)
