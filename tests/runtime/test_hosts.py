"""Several processes: whether they are connected, and the order of their devices."""

import types

import commands
import jax
import pytest
import tiny

import lakd_jax
from lakd_jax import errors
from lakd_jax.runs import single
from lakd_jax.runtime import hosts
from lakd_jax.runtime import mesh as mesh_lib

# ml_collections loads config files in a way deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def pod(monkeypatch):
    """Makes JAX report four unconnected processes, as on a TPU pod."""

    def begun(*_):  # a test that fails must not train
        raise errors.DataError("the run began")

    monkeypatch.setattr(single, "environment", begun)
    monkeypatch.setattr(jax, "process_count", lambda: 4)


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_unconnected_processes_do_not_begin(pod, main, more, tmp_path):
    result = main(commands.DIGITS, f"--workdir={tmp_path / 'run'}", *more)
    words = ("4 processes here, but they are not connected", "--coordinator=auto")
    commands.assert_refused(result, *words)
    assert not list(tmp_path.iterdir())


def test_unconnected_processes_do_not_begin_from_python(pod, tmp_path):
    config = tiny.config(tmp_path / "data")
    words = r"--coordinator=auto.*\n.*call jax\.distributed\.initialize\(\) first"
    with pytest.raises(errors.HostsError, match=words):
        lakd_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_connected_processes_begin(pod, monkeypatch):
    with pytest.raises(errors.HostsError):
        hosts.require_connected()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert hosts.require_connected() is None  # and raises nothing


def test_devices_of_a_process_are_neighbours():
    """Two by two chips on each of two hosts, numbered row by row over both."""
    places = [(0, 0), (0, 1), (1, 2), (1, 3), (0, 4), (0, 5), (1, 6), (1, 7)]
    devices = [types.SimpleNamespace(process_index=p, id=i) for p, i in places]
    mixed = [devices[i] for i in (3, 4, 0, 7, 2, 5, 1, 6)]
    found = [(d.process_index, d.id) for d in mesh_lib.by_process(mixed)]
    assert found == [(0, i) for i in (0, 1, 4, 5)] + [(1, i) for i in (2, 3, 6, 7)]


def test_the_mesh_has_them_in_that_order(monkeypatch):
    devices = jax.devices()
    assert len(devices) == 8
    monkeypatch.setattr(jax, "devices", lambda: devices[5:] + devices[:5][::-1])
    assert list(mesh_lib.data_mesh().devices) == devices


def test_a_lost_process_is_an_error_of_its_own(monkeypatch):
    """Promise 29: it names the remedy; with one process, errors stay what they are."""
    lost = jax.errors.JaxRuntimeError("Gloo: connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), hosts.together():
        raise lost
    monkeypatch.setattr(hosts, "count", lambda: 2)
    words = "another process was lost(.|\n)*same commands"
    with pytest.raises(errors.HostsError, match=words), hosts.together():
        raise lost
    with pytest.raises(ValueError, match="^other$"), hosts.together():
        raise ValueError("other")
