"""Which processes are connected without being asked to, and which never."""

import http.server
import importlib.util
import threading

import commands
import pytest

from lakd_jax.runtime import hosts, launchers

# ml_collections loads config files in a way deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# What Slurm sets in the script of `sbatch --nodes=2 --ntasks=4`, which runs once.
BATCH = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
STEP = BATCH | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
}
POD = {"TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a,a-2.a", "TPU_WORKER_ID": "2"}


@pytest.fixture
def library(monkeypatch):
    """Makes libtpu appear to be installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "libtpu" or find(name)
    )


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (STEP, "process 3 of 4 (Slurm, node[1-2])"),
        (MPI, "process 1 of 2 (Open MPI, mpirun's hosts)"),
        (STEP | MPI, "process 1 of 2 (Open MPI, mpirun's hosts)"),
        (POD, "process 2 of 3 (GKE, 3 hosts)"),
        (POD | {"TPU_SKIP_MDS_QUERY": "true"}, "process 2 of 3 (GKE, 3 hosts)"),
        (
            POD | {"MEGASCALE_NUM_SLICES": "2"},
            "process 2 of a slice, one of 6 (GKE, 2 slices)",
        ),
    ],
)
def test_processes_that_were_started_together(environment, text, library):
    assert str(launchers.find(environment)) == text


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        # The shell of salloc is a step of one task in an allocation of four.
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        # That of `srun --ntasks=4 --pty bash` is one of four, and the rest do nothing.
        STEP | {"SLURM_PTY_PORT": "40001"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},  # Open MPI 5
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        POD | {"TPU_VISIBLE_CHIPS": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
    ],
)
def test_a_process_alone(environment, library):
    skip = {"TPU_SKIP_MDS_QUERY": "1"}  # set by JAX where there is no TPU
    assert launchers.find(skip | environment) is None


def test_without_libtpu_a_machine_is_no_part_of_a_slice(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(launchers, "_metadata", None)
    assert launchers.find(POD) is None and launchers.find({}) is None


@pytest.fixture
def metadata():
    """A metadata server on this machine: (its address, its attributes, their names)."""
    attributes, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            asked.append(name)
            allowed = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if allowed and name in attributes else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "<html>none</html>").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        serve = server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", attributes, asked
        server.shutdown()


@pytest.mark.parametrize(
    ("endpoints", "settings", "text"),
    [
        ("10.0.0.2,10.0.0.3", "", "process 1 of 2 (Cloud TPU, 2 hosts)"),
        ("a:0:10.0.0.2,b:1:10.0.0.3", "X: 'y'", "process 1 of 2 (Cloud TPU, 2 hosts)"),
        (
            "10.0.0.2",
            "X: 'y'\nMEGASCALE_NUM_SLICES: '3'\n",
            "process 1 of a slice, one of 3 (Cloud TPU, 3 slices)",
        ),
        ("10.0.0.2", "X: 'y'", "None"),
        ("", "", "None"),
    ],
)
def test_a_virtual_machine_asks_what_slice_it_is_in(
    endpoints, settings, text, metadata, library
):
    address, attributes, asked = metadata
    if endpoints:
        attributes |= {"worker-network-endpoints": endpoints, "tpu-env": settings}
        attributes["agent-worker-number"] = "1"
    assert str(launchers.find({"GCE_METADATA_IP": address})) == text
    assert asked
    asked.clear()
    # JAX sets this where there is no TPU: nothing is asked there.
    launchers.find({"GCE_METADATA_IP": address, "TPU_SKIP_MDS_QUERY": "1"})
    assert not asked


def test_without_a_metadata_server_it_is_alone(library):
    environment = {"GCE_METADATA_IP": "127.0.0.1:1"}
    assert launchers.find(environment) is None


@pytest.fixture
def connections(monkeypatch):
    """What is connected, in place of connecting; this process is in a step of Slurm."""
    found = []
    monkeypatch.setattr(launchers, "find", lambda: launchers._slurm(STEP))
    monkeypatch.setattr(hosts, "connect", lambda *args: found.append(args))
    return found


def test_a_job_is_joined_without_a_flag_and_said_so(connections, capfd):
    assert hosts.join("", None, None)
    ((coordinator, _, _, wait, job),) = connections
    assert (coordinator, wait, job.process) == ("auto", hosts.CONNECT_SECONDS, "3")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Slurm started 4 processes") and "=none" in line


def test_flags_decide_before_the_environment(connections, capfd):
    assert not hosts.join("none", None, None)
    assert not connections
    assert hosts.join("host:1", 2, 0, 9)
    assert connections == [("host:1", 2, 0, 9, None)]
    assert hosts.join("auto", None, None, 7)
    assert connections[1][3] == 7 and not capfd.readouterr().err


def test_a_single_process_connects_to_nothing(connections, monkeypatch):
    monkeypatch.setattr(launchers, "find", lambda: None)
    assert not hosts.join("", None, None) and not connections


def test_the_command_joins_and_is_told_with_which_flags(monkeypatch, main):
    def join(*flags):
        raise hosts.errors.HostsError(str(flags))

    monkeypatch.setattr(hosts, "join", join)
    commands.assert_refused(main(commands.DIGITS), "('', None, None, None)")
    flags = ("--coordinator=h:1", "--num_processes=2", "--process_id=1", "--wait=600")
    commands.assert_refused(main(commands.DIGITS, *flags), "('h:1', 2, 1, 600)")
