"""Two processes train as one does, stop together, and never hang."""

import json
import pathlib
import shutil
import signal
import time

import commands
import jax
import processes
import pytest
import test_train_resume as resume
import test_train_step as steps
import tiny

from lakd_jax import errors
from lakd_jax.config import check
from lakd_jax.report import metrics
from lakd_jax.runs import command as command_lib
from lakd_jax.runtime import hosts
from lakd_jax.store import workdir

# ml_collections loads config files in a way deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

PROGRAM = pathlib.Path(__file__).parents[1] / "support" / "one_of_several.py"
LONG = pytest.mark.long
PLAIN = {"method": "none", "epochs": 2, "optim__lr": 0.01, "compile_cache": ""}


def start(folder, *fields):
    """Starts one process, with one device, for each of `fields`."""
    address, count = f"localhost:{processes.free_port()}", len(fields)
    return [
        processes.start(PROGRAM, address, count, index, folder, json.dumps(own))
        for index, own in enumerate(fields)
    ]


def both(folder, fields):
    """Trains in two processes, which must succeed."""
    return succeeded(start(folder, fields, fields))


def succeeded(running):
    found = processes.ended(running)
    for code, _, err in found:
        assert code == 0, err
    return found


def finished(folder):
    """Returns what is in the folder of the run in `folder`, see `resume.finished`."""
    return resume.finished(folder / "run")


@pytest.fixture
def alone():
    """Trains in this process on two devices; returns the same as `finished`."""

    def run(folder, fields):
        config = tiny.small(folder, **fields)
        command_lib.run(config, folder / "run", notify=lambda text: None)
        return finished(folder)

    with tiny.environment(devices=2):
        yield run


def assert_close(one, other):
    steps.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    for name in ("test_last", "test_best_on_minival"):
        score, expected = one[1][name], other[1][name]
        assert score.keys() == expected.keys() and score["examples"] == 45
        for key, value in expected.items():  # less than one example
            assert score[key] == (value and pytest.approx(value, rel=1e-5)), key


@LONG
def test_two_processes_train_as_two_devices_of_one(place, tmp_path, alone):
    """Promises 27, 30: eight steps, and 45 test images in batches of 16."""
    (_, out, _), (_, other_out, other_err) = both(place / "two", PLAIN)
    assert_close(finished(place / "two"), alone(tmp_path / "one", PLAIN))
    assert "Pictures, metrics and the student are in" in out
    lines = [line for line in other_out.splitlines() if not line.startswith("[Gloo]")]
    assert not lines and not other_err  # only process 0 prints


def test_differing_configs_stop_all(tmp_path):
    """Promise 28: with both values, and without hanging."""
    found = processes.ended(start(tmp_path, PLAIN, {**PLAIN, "epochs": 3}), timeout=60)
    for code, _, err in found:
        assert code == 2, err
        assert "process 1 differs from process 0 in 1 values" in err
        assert "epochs: 2 in process 0, 3 in it" in err
    assert not (tmp_path / "run").exists()


@LONG
def test_what_stops_the_first_process_stops_all(tmp_path):
    """Promise 30: every process reports the reason."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (code, _, err), (other, _, other_err) = processes.ended(
        start(tmp_path, PLAIN, PLAIN), 60
    )
    assert code == other == 2
    assert "has checkpoints but no config.json" in err
    assert "process 0 stopped: " in other_err and err.strip() in other_err


def test_they_cannot_meet_once_jax_has_devices():
    jax.devices()
    with pytest.raises(
        errors.HostsError, match="cannot connect: .* before any JAX calls"
    ):
        hosts.connect("localhost:1", 2, 1)


@LONG
def test_a_signal_to_one_stops_both_and_both_go_on(tmp_path, alone):
    """Promise 10: after the same step, and with one checkpoint."""
    fields = PLAIN | {"epochs": 24}
    both(tmp_path / "unbroken", fields)
    running = start(tmp_path / "parts", fields, fields)
    run = tmp_path / "parts" / "run"
    until(lambda: metrics.read(run), running)
    running[1].send_signal(signal.SIGTERM)
    for _, _, err in succeeded(running):
        assert "Stopped; the same command goes on" in err
    stopped = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert 4 <= stopped[-1] < 96
    assert not (run / workdir.RESULT).exists()
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    both(tmp_path / "parts", fields)
    unbroken, parts = finished(tmp_path / "unbroken"), finished(tmp_path / "parts")
    resume.assert_equal_runs(unbroken, parts)
    # One process reads what two have written; it keeps teachers elsewhere.
    settings = tmp_path / "one" / "run" / "config.json"
    text = settings.read_text().replace(str(tmp_path / "parts"), str(tmp_path / "one"))
    settings.write_text(text)
    logs = [
        {r["step"]: r["loss"] for r in run[2] if r["kind"] == "train"}
        for run in (alone(tmp_path / "one", fields), unbroken)
    ]
    steps.assert_close(*logs, rtol=1e-2)  # see test_devices_train_as_one


def until(condition, running):
    while not condition():
        assert all(p.poll() is None for p in running), processes.ended(running)
        time.sleep(0.05)


@LONG
@pytest.mark.parametrize("killed", [0, 1])
def test_the_loss_of_one_ends_the_other(killed, tmp_path):
    """Promise 29: with a message, and without hanging."""
    fields = PLAIN | {"epochs": 1000}
    running = start(tmp_path, fields, fields)
    until(lambda: metrics.read(tmp_path / "run"), running)
    running[killed].kill()
    code, _, err = processes.ended(running, timeout=60)[1 - killed]
    assert code not in (0, None)
    assert "another process was lost" in err or "another task died" in err


@LONG
def test_a_program_a_module_works_over_processes(tmp_path, alone):
    fields = PLAIN | {"method": "lakd", "local__engine": "dispatch"}
    both(tmp_path / "two", fields)
    assert_close(finished(tmp_path / "two"), alone(tmp_path / "one", fields))


def test_a_pipeline_over_processes_is_refused(tmp_path, monkeypatch):
    config = tiny.config(tmp_path, method="lakd", local__engine="pipeline")
    monkeypatch.setattr(hosts, "count", lambda: 2)
    found = check.problems(config, 2)
    (line,) = found
    assert "local.engine=pipeline" in line and "use fused or dispatch" in line


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--coordinator=h:1"], "--num_processes and --process_id missing"),
        (["--process_id=0", "--num_processes=2"], "--coordinator missing"),
        (["h", "2", "0"], "HOST:PORT of process 0, is 'h'"),
        (["h:70000", "2", "0"], "HOST:PORT of process 0, is 'h:70000'"),
        (["h:1", "0", "0"], "--num_processes must be at least 1, is 0"),
        (["h:1", "2", "2"], "--process_id must be from 0 to 1"),
        (["h:1", "2", "-1"], "--process_id must be from 0 to 1"),
        (["h:1", "x", "0"], "num_processes"),
        (["auto", "2", "0"], "--coordinator=auto finds --num_processes"),
        (["none", "2", "0"], "--coordinator=none connects nothing: omit"),
        (["--coordinator=none", "--wait=9"], "--coordinator=none connects nothing"),
        (["--wait=0"], "--wait must be at least 1 second, is 0"),
    ],
)
def test_flags_are_checked_before_anything_waits(flags, word, main, tmp_path):
    names = ("--coordinator", "--num_processes", "--process_id")
    if not flags[0].startswith("--"):
        flags = [f"{name}={value}" for name, value in zip(names, flags, strict=True)]
    commands.assert_refused(
        main(commands.DIGITS, f"--workdir={tmp_path}", *flags), word
    )
    assert not list(tmp_path.iterdir())


def test_without_a_scheduler_auto_says_what_to_give(tmp_path):
    flags = (commands.DIGITS, f"--workdir={tmp_path}", "--coordinator=auto")
    (result,) = processes.ended([processes.start("main.py", *flags)])
    commands.assert_refused(
        result, "finds no Slurm, TPU pod", "Set --coordinator=HOST:PORT"
    )


def test_a_process_that_waits_in_vain_says_for_whom():
    port = processes.free_port()
    flags = (f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=1")
    running = [processes.start("main.py", commands.DIGITS, *flags, "--wait=1")]
    err = commands.assert_refused(processes.ended(running)[0], "within 1 s", "--wait=")
    assert err.startswith(f"process 1 of 2, at localhost:{port}: ")


@LONG
@pytest.mark.parametrize("flags", [["--coordinator=auto"], []])
def test_slurm_is_asked_who_is_who(flags, tmp_path):
    """Two tasks on this host, with the variables that srun sets."""
    command = ["main.py", commands.DIGITS, *flags]
    command += [f"--workdir={tmp_path}", "--config.method=none", "--config.epochs=1"]
    command += ["--config.student.name=resnet8", "--config.batch_size=256"]
    command += ["--config.baselines=()", "--config.compile_cache="]
    # JAX derives the port from the job's number.
    slurm = {"SLURM_JOB_ID": str(processes.free_port()), "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
    running = [
        processes.start(*command, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
        for i in range(2)
    ]
    (_, _, err), (_, _, other_err) = succeeded(running)
    assert ("Slurm started 2 processes" in err) == (not flags) and not other_err
    settings = json.loads((tmp_path / "environment.json").read_text())
    assert len(settings["devices"]) == 2


def test_other_modes_take_no_processes(main, tmp_path):
    result = main("--mode=explain", f"--workdir={tmp_path}", "--num_processes=2")
    commands.assert_refused(result, "--num_processes has no effect with --mode=explain")
