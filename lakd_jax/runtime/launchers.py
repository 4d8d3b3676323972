"""Detects whether a launcher started this process as one of several.

Looks where `jax.distributed.initialize` looks, in the same order, and is stricter: only
processes that all run the same command are to be connected without being asked to.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import urllib.request
from collections.abc import Mapping

# What JAX reads of Slurm. A batch script without srun has no SLURM_STEP_NODELIST.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_PINNED = ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")
_METADATA_SECONDS = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """Processes that one launcher has started.

    Attributes:
      launcher: its name.
      count: number of processes, at least two.
      process: number of this process, as the launcher counts.
      place: where they run, process 0 first.
    """

    launcher: str
    count: int
    process: str
    place: str

    def __str__(self) -> str:
        return f"process {self.process} of {self.count} ({self.launcher}, {self.place})"


def find(environment: Mapping[str, str] = os.environ) -> Job | None:
    """Returns the job of several processes that this one belongs to, if any.

    Reads environment variables. On a Cloud TPU VM it also asks Google's metadata
    server, which is on the same machine; elsewhere nothing is asked.
    """
    for present in (_open_mpi, _slurm, _tpu):
        if job := present(environment):
            return job if job.count > 1 else None
    return None


def _open_mpi(environment: Mapping[str, str]) -> Job | None:
    # JAX needs it for the address; Open MPI 5 no longer sets it.
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        return None
    count = _number(environment.get("OMPI_COMM_WORLD_SIZE", ""))
    rank = environment.get("OMPI_COMM_WORLD_RANK", "?")
    return Job("Open MPI", count, rank, "mpirun's hosts")


def _slurm(environment: Mapping[str, str]) -> Job | None:
    if not all(name in environment for name in _SLURM):
        return None
    tasks = environment["SLURM_NTASKS"]
    # An interactive shell is a single process, whatever was allocated; in one that
    # salloc opens, SLURM_NTASKS counts the allocation instead of the step.
    is_shell = "SLURM_PTY_PORT" in environment
    if is_shell or environment.get("SLURM_STEP_NUM_TASKS") != tasks:
        return None
    number, nodes = environment["SLURM_PROCID"], environment["SLURM_STEP_NODELIST"]
    return Job("Slurm", _number(tasks), number, nodes)


def _tpu(environment: Mapping[str, str]) -> Job | None:
    has_library = "TPU_LIBRARY_PATH" in environment or importlib.util.find_spec(
        "libtpu"
    )
    # A process that was given some of a host's chips is to use these alone.
    if not has_library or any(name in environment for name in _PINNED):
        return None
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get(
        "TPU_WORKER_HOSTNAMES"
    )
    if names:
        launcher, number = "GKE", environment.get("TPU_WORKER_ID", "?")
        slices = environment.get("MEGASCALE_NUM_SLICES", "")
    elif "TPU_SKIP_MDS_QUERY" in environment:  # JAX sets it where there is no TPU
        return None
    elif names := _metadata(environment, "worker-network-endpoints"):
        launcher, number = "Cloud TPU", _metadata(environment, "agent-worker-number")
        slices = environment.get("MEGASCALE_NUM_SLICES") or _slices(
            _metadata(environment, "tpu-env")
        )
    else:
        return None
    hosts = len(names.split(","))
    count = hosts * _number(slices)
    if count > hosts:
        return Job(launcher, count, f"{number} of a slice, one", f"{slices} slices")
    return Job(launcher, count, number, f"{hosts} hosts")


def _slices(settings: str) -> str:
    """Returns MEGASCALE_NUM_SLICES of lines like `NAME: 'VALUE'`."""
    for line in settings.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "MEGASCALE_NUM_SLICES":
            return value.strip(" '\"")
    return ""


def _metadata(environment: Mapping[str, str], name: str) -> str:
    """Returns an attribute of this virtual machine, "" if there is none."""
    host = environment.get("GCE_METADATA_IP", "169.254.169.254")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode().strip()
    except (OSError, ValueError):  # no such server, no such attribute
        return ""


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 1
