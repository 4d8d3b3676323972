"""Every test sees eight CPU devices, strict shapes, and warnings as errors."""

import gc
import importlib.util
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

import fake_bucket  # noqa: E402
import jax  # noqa: E402
import places  # noqa: E402
import pytest  # noqa: E402
import states  # noqa: E402
import tiny  # noqa: E402

from lakd_jax import cli, paths  # noqa: E402
from lakd_jax.store import checkpoint  # noqa: E402

jax.config.update("jax_num_cpu_devices", compilation.DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Without it a worker keeps every program of every module: several GiB.

    Garbage is collected here only: JAX's tracing makes so many objects that looking
    for garbage among them takes a tenth of the time of tests that trace much.
    """
    gc.disable()
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory):
    """A folder with checkpoints 1 and 2, only to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with checkpoint.Checkpointer(folder, keep=3) as saver:
        saver.save(1, states.make_state(1), extra={"epoch": 1})
        saver.save(2, states.make_state(2), extra={"epoch": 2})
    return folder


@pytest.fixture(scope="session")
def objects():
    """A bucket that every client finds; needs the extra "gcs"."""
    if importlib.util.find_spec("gcsfs") is None:  # it is `paths` that imports it
        pytest.skip("gcsfs is not installed")
    with fake_bucket.serve() as found:
        yield found


@pytest.fixture(params=["disk", pytest.param("bucket", marks=pytest.mark.long)])
def place(request, tmp_path):
    """A folder for a run: on the disk, then in a bucket."""
    if request.param == "disk":
        return tmp_path
    request.getfixturevalue("objects")
    return places.in_bucket(tmp_path.name)


@pytest.fixture(scope="module")
def tiny_data():
    """Runs of the module find `tiny.dataset`, on one device."""
    with tiny.environment():
        yield


@pytest.fixture(scope="session")
def two_steps_in_bucket(objects):
    folder = places.in_bucket("two/checkpoints")
    with checkpoint.Checkpointer(folder, keep=3) as saver:
        saver.save(1, states.make_state(1), extra={"epoch": 1})
        saver.save(2, states.make_state(2), extra={"epoch": 2})
    return folder


@pytest.fixture
def copied_in(request, place):
    """A copy of `two_steps`, where `place` is."""
    kind = "two_steps_in_bucket" if paths.is_bucket(place) else "two_steps"
    return places.copied(request.getfixturevalue(kind), place / "checkpoints")


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
