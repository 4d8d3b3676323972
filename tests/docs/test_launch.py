"""The scripts of launch/ do what they say, with stand-ins for what they call."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import commands
import processes
import pytest
import yaml

from lakd_jax.config import check, command_line
from lakd_jax.runtime import hosts

# ml_collections loads config files in a way deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

LAUNCH = commands.ROOT / "launch"
CONFIG = "--config=configs/cifar100_lakd.py"
# Writes its arguments and variables to a file in $RECORD, and does what $THEN says.
STAND_IN = """#!{python}
import json, os, pathlib, subprocess, sys
text = json.dumps([sys.argv, dict(os.environ)])
pathlib.Path(os.environ["RECORD"], str(os.getpid())).write_text(text)
then = os.environ.get("THEN")
sys.exit(subprocess.call(["bash", "-c", then]) if then else 0)
"""


class Stage:
    """A folder of stand-ins, first on the PATH, and what they were called with."""

    def __init__(self, folder, *names):
        self.record = folder / "record"
        self.record.mkdir()
        self.folder = folder
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STAND_IN.format(python=sys.executable))
            path.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "HOME": str(folder),
            "PYTHON": str(folder / "bin" / "python"),
        }

    def run(self, *command, cwd=commands.ROOT, **variables):
        """Runs a command to its end; returns what `subprocess.run` does."""
        return subprocess.run(
            [str(c) for c in command],
            cwd=cwd,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, name):
        """[(arguments, variables)] of the calls of a stand-in."""
        found = [json.loads(p.read_text()) for p in sorted(self.record.iterdir())]
        return [(a[1:], env) for a, env in found if a[0].rpartition("/")[2] == name]

    def trained(self):
        """[arguments after main.py] of all trainings that were started."""
        found = self.calls("python")
        assert found and all(arguments[0] == "main.py" for arguments, _ in found)
        return [arguments[1:] for arguments, _ in found]


def assert_accepted(argv, devices=16):
    """The command line is without fault; returns (coordinator, workdir, config)."""
    values, problem = command_line.attempt(command_line.split(argv)[1])
    assert not problem
    process = (values.coordinator, values.num_processes, values.process_id, values.wait)
    assert not hosts.fault(*process)
    config, workdir, _ = command_line.parse(argv)
    assert not check.problems(config, devices)
    return values.coordinator, workdir, config


def document(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def in_pod():
    """The pod of launch/jobset.yaml, and the job it belongs to."""
    (slice_,) = document("jobset.yaml")["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    return job["template"]["spec"], job


def scripts():
    """{name: text} of all that a shell runs."""
    found = {p.name: p.read_text() for p in LAUNCH.glob("*.s*")}
    sky = document("skypilot.yaml")
    (container,) = in_pod()[0]["containers"]
    found |= {"setup": sky["setup"], "run": sky["run"], "pod": container["command"][2]}
    return found


@pytest.mark.parametrize("name", sorted(scripts()))
def test_scripts_are_bash(name):
    text = scripts()[name]
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    if name.endswith(".sh") or name.endswith(".sbatch"):
        assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text


def test_the_page_names_every_file():
    page = (commands.ROOT / "docs" / "launch.md").read_text()
    names = {p.name for p in LAUNCH.iterdir()}
    assert names == {n for n in names if f"(../launch/{n})" in page}


def test_a_slice_of_tpu_vms(tmp_path):
    stage = Stage(tmp_path, "bin/gcloud", "lakd/.venv/bin/python", "bin/sleep")
    nfs, source = {"NFS": "10.0.0.2:/share"}, {"SOURCE": "https://host/lakd.git"}
    script = LAUNCH / "tpu_vm.sh"
    flags = (CONFIG, "--config.batch_size=2048", "--config.baselines=('none', 'kd')")
    assert stage.run(script, "create").returncode == 1  # without NFS
    for arguments in (["create"], ["train", *flags], ["stop"], ["follow"], ["delete"]):
        done = stage.run(script, *arguments, **nfs)
        assert done.returncode == 0, done.stderr
    assert stage.run(script, "install", **nfs).returncode == 1  # without SOURCE
    assert stage.run(script, "install", **nfs, **source).returncode == 0
    assert stage.run(script, "tran", **nfs).returncode == 2
    calls = [arguments for arguments, _ in stage.calls("gcloud")]
    assert len(calls) == 6
    assert all(c[:3] == ["compute", "tpus", "tpu-vm"] and "lakd" in c for c in calls)
    remote = [c[-1].removeprefix("--command=") for c in calls if c[3] == "ssh"]
    for text in remote:
        assert stage.run("bash", "-n", "-c", text).returncode == 0
    assert any("clone https://host/lakd.git " in text for text in remote)
    # What is sent to each host is run here, in a home with a stand-in for Python.
    (text,) = [text for text in remote if "nohup" in text]
    assert stage.run("bash", "-c", text, cwd=tmp_path).returncode == 0
    until(lambda: stage.calls("python"))
    (argv,) = stage.trained()
    assert argv[-3:] == list(flags)
    assert assert_accepted(argv)[:2] == ("auto", "/mnt/lakd/runs/lakd")


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen within 30 s")


def test_a_slice_of_gke(tmp_path):
    pod, job = in_pod()
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    sides = [int(side) for side in topology.split("x")]
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == math.prod(sides) == 16
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"]: "/shared" for volume in pod["volumes"]}
    stage = Stage(tmp_path, "bin/python")
    shell, option, text = container["command"]
    command = (shell, option, text.replace("/shared", str(tmp_path)))
    table = tmp_path / "runs" / "lakd" / "table.md"
    table.parent.mkdir(parents=True)
    assert stage.run(*command).returncode == 1  # stopped and saved: to be restarted
    assert stage.run(*command, THEN=f"touch {table}").returncode == 0  # finished
    assert stage.run(*command, THEN="exit 3").returncode == 1
    assert assert_accepted(stage.trained()[0])[0] == "auto"


def test_a_pod_passes_a_signal_on_and_waits(tmp_path):
    stage = Stage(tmp_path, "bin/python")
    (container,) = in_pod()[0]["containers"]
    shell, option, text = container["command"]
    saves = "trap 'sleep 0.3; touch $RECORD/../saved; exit 0' TERM; touch $RECORD/../up"
    # bash -c of the stand-in is another process, so the program itself has to trap.
    program = f"#!/usr/bin/env bash\n{saves}\nwhile true; do sleep 0.05; done\n"
    (tmp_path / "bin" / "python").write_text(program)
    process = subprocess.Popen([shell, option, text], env=stage.environment)
    until((tmp_path / "up").exists)
    process.terminate()
    assert process.wait(timeout=30) == 1  # there is no table
    assert (tmp_path / "saved").exists()


def test_a_slice_that_skypilot_finds(tmp_path):
    task = document("skypilot.yaml")
    assert task["resources"]["accelerators"].startswith("tpu-")
    stage = Stage(tmp_path, ".venv/bin/python")
    assert stage.run("bash", "-c", task["run"], cwd=tmp_path).returncode == 0
    (argv,) = stage.trained()
    assert assert_accepted(argv)[0] == "auto"


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_job_of_slurm(is_finished, tmp_path):
    stage = Stage(tmp_path, "bin/srun", "bin/scontrol")
    run = tmp_path / "run"
    run.mkdir()
    if is_finished:
        (run / "table.md").touch()
    variables = {"SLURM_JOB_ID": "7", "WORKDIR": str(run)}
    script = LAUNCH / "slurm.sbatch"
    done = stage.run("bash", script, CONFIG, "--config.batch_size=1024", **variables)
    assert done.returncode == 0, done.stderr
    requeued = [arguments for arguments, _ in stage.calls("scontrol")]
    assert requeued == ([] if is_finished else [["requeue", "7"]])
    ((arguments, _),) = stage.calls("srun")
    argv = arguments[arguments.index("main.py") + 1 :]
    assert assert_accepted(argv, devices=8)[0] == "auto"
    failed = stage.run("bash", script, CONFIG, THEN="exit 5", **variables)
    assert failed.returncode == 5 and len(stage.calls("scontrol")) == len(requeued)


_SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[next(i for i, a in enumerate(sys.argv[1:], 1) if a[0] != "-"):]
step = dict(SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="localhost")
numbers = [dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
running = [subprocess.Popen(command, env=os.environ | step | n) for n in numbers]
sys.exit(max(process.wait() for process in running))
"""


@pytest.mark.long
def test_a_job_of_slurm_connects_its_tasks(tmp_path):
    """Two tasks on this host, as far as a dry run."""
    stage = Stage(tmp_path, "bin/srun", "bin/scontrol")
    (tmp_path / "bin" / "srun").write_text(_SRUN.format(python=sys.executable))
    variables = {"SLURM_JOB_ID": str(processes.free_port()), "PYTHON": sys.executable}
    flags = (commands.DIGITS, "--dry_run", "--config.baselines=()")
    flags += ("--config.method=none", "--config.student.name=resnet8")
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *flags],
        cwd=commands.ROOT,
        env=stage.environment | variables | {"WORKDIR": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout, done.stdout


def test_a_seed_per_chip(tmp_path):
    stage = Stage(tmp_path, "bin/python")
    script, run = LAUNCH / "seeds.sh", tmp_path / "run"
    config = "--config=configs/cifar10_lakd.py"
    flags = (config, "--config.teacher.init=runs/teacher")
    done = stage.run(script, 3, *flags, WORKDIR=str(run))
    assert done.returncode == 0, done.stderr
    found = [(*assert_accepted(a[1:], 1), e) for a, e in stage.calls("python")]
    assert len(found) == 4 and all(coordinator == "none" for coordinator, *_ in found)
    single = {w: (c.seed, e) for _, w, c, e in found if not c.seeds}
    for chip in range(3):
        seed, variables = single[f"{run}/seed{chip}"]
        assert seed == chip
        for name in ("TPU_VISIBLE_CHIPS", "CUDA_VISIBLE_DEVICES"):
            assert variables[name] == str(chip)
    ((workdir, config),) = [(w, c) for _, w, c, _ in found if c.seeds]
    assert config.seeds == (0, 1, 2) and workdir == str(run)
    stopped = stage.run(script, 2, *flags, WORKDIR=str(run), THEN="exit 2")
    assert stopped.returncode == 1 and "process*.log" in stopped.stderr
    assert pathlib.Path(run, "process1.log").exists()
