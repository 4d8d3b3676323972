"""Processes that are stopped or killed end as one that was left alone, to the bit."""

import concurrent.futures
import dataclasses
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from lakd_jax import interop, paths
from lakd_jax.report import metrics
from lakd_jax.store import checkpoint, workdir

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
EPOCH, STEPS, SAVE_EVERY = 22, 44, 3  # steps
# Steps as fast as can be, and starts that find all of their programs compiled.
FAST = {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
PATIENCE = 300  # seconds; a run takes some ten of them on a quiet machine
CONFIG = """
from lakd_jax import config

def get_config(method):
    c = config.default()
    c.update(method=method, epochs=2, batch_size=32, eval_batch_size=32, log_every=1)
    c.data.update(source="digits", image_size=8, minival=0.5, pad=1, drop_last=True)
    c.student.name = c.teacher.name = "resnet8"
    c.teacher.floor = 0.01
    c.optim.update(schedule="cosine", warmup_epochs=1.0)
    c.checkpoint.every_steps = 3
    return c
"""


class Process:
    """`python main.py ARGS`; what it says can be waited for."""

    def __init__(self, *args, **environment):
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "main.py", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | FAST | environment,
        )
        self.lines = []
        # One that hangs is killed, which fails the test.
        self._timer = threading.Timer(PATIENCE, self._process.kill)
        self._timer.start()

    def wait_for(self, text):
        """Reads up to the line that begins with `text`; False if it never comes."""
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(text):
                return True
        return False

    def time_to(self, text):
        """Seconds from the beginning of training to the line of that beginning."""
        self.wait_for("resnet8, ")
        began = time.monotonic()
        assert self.wait_for(text), self.end()[1]
        return time.monotonic() - began

    def send(self, number):
        self._process.send_signal(number)

    def end(self):
        """(exit code, everything it said)."""
        self.wait_for("\0")
        code = self._process.wait()
        self._timer.cancel()
        return code, "\n".join(self.lines)


@dataclasses.dataclass(frozen=True)
class Lab:
    """The unbroken runs of each method, and how to start others like them."""

    root: pathlib.Path
    start_seconds: float  # to the first step, with all to be compiled
    seconds: float  # to the last step of the slower method

    def start(self, method, directory, *args, **environment):
        return Process(
            f"--config={self.root / 'config.py'}:{method}",
            f"--config.teacher.init={self.root / 'none'}",
            f"--workdir={directory}",
            *args,
            **environment,
        )

    def check(self, method, directory):
        """`directory` holds what the unbroken run of `method` left."""
        assert left_by(directory) == left_by(self.root / method)


def left_by(directory):
    variables, _ = interop.load_variables(directory / workdir.STUDENT)
    arrays = jax.tree.map(np.ndarray.tobytes, variables)
    return arrays, (directory / metrics.FILENAME).read_bytes()


def complete(process):
    code, said = process.end()
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    (root / "config.py").write_text(CONFIG)
    lab = Lab(root, 0.0, 0.0)
    cold = {"JAX_COMPILATION_CACHE_DIR": str(root / "cache")}
    first = lab.start("none", root / "none", **cold)  # serves as the teacher, too
    start_seconds = first.time_to("step 1/")
    complete(first)
    lakd = lab.start("lakd", root / "lakd")
    seconds = lakd.time_to(f"step {STEPS}/")
    complete(lakd)
    return Lab(root, start_seconds, seconds)


def saved(directory):
    return checkpoint.list_steps(directory / "checkpoints")


def last_step(said):
    """The last step that a process reported, 0 for none."""
    return max([0, *map(int, re.findall(r"^step (\d+)/", said, re.MULTILINE))])


def test_stopped_process_goes_on_to_the_same_end(lab, tmp_path):
    """Promises 6, 9, 12: its last save is whole, its end the same to the bit."""
    # A save is under way nearly always.
    args = ("lakd", tmp_path / "run", "--config.checkpoint.every_steps=1")
    process = lab.start(*args)
    assert process.wait_for(f"step {EPOCH + 7}/")
    process.send(signal.SIGTERM)
    said = complete(process)
    assert "SIGTERM: will save and stop" in said
    assert said.endswith("Stopped; the same command goes on from here.")
    assert "Traceback" not in said
    last = last_step(said)
    assert EPOCH + 7 <= saved(tmp_path / "run")[-1] <= STEPS
    assert saved(tmp_path / "run")[-1] in (last, last + 1)  # the last may be unsaid
    said = complete(lab.start(*args))
    assert re.search(rf"resumed at step ({last}|{last + 1}) of {STEPS}", said)
    lab.check("lakd", tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "share"), [(signal.SIGTERM, 0.1), (signal.SIGINT, 0.6)]
)
def test_stop_during_the_compilation(lab, number, share, tmp_path):
    """Promises 9, 11: it ends at once, and the same command starts again."""
    # With nothing in the cache this takes most of the time before the first step.
    cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    process = lab.start("none", tmp_path / "run", **cold)
    assert process.wait_for("resnet8, ")
    time.sleep(share * lab.start_seconds)
    process.send(number)
    code, said = process.end()
    # On a machine that has become faster since, some steps may have been made.
    assert code in (-number, 0), said
    assert "Traceback" not in said
    assert code == 0 or not last_step(said)
    complete(lab.start("none", tmp_path / "run"))
    lab.check("none", tmp_path / "run")


def test_killed_at_random_moments(lab, place):
    """Promise 1: ten kills, and each start goes on from a whole checkpoint."""
    kills, methods = 5, ("none", "lakd")
    if paths.is_bucket(place):
        kills, methods = 2, ("lakd",)  # each start takes longer there
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(killed, lab, method, place / method, kills=kills)
            for method in methods
        ]
        for job in jobs:
            job.result()


def killed(lab, method, directory, kills):
    """Starts the run again and again, kills it `kills` times, then lets it end."""
    moments = random.Random(method)
    steps = []
    while kills:
        process = lab.start(method, directory)
        assert process.wait_for("resnet8, "), process.end()[1]
        time.sleep(moments.uniform(0, 0.7 * lab.seconds))
        process.send(signal.SIGKILL)
        code, said = process.end()
        if code == 0:  # it was faster; the next starts from scratch
            lab.check(method, directory)
            directory = directory.with_name(f"{directory.name}-again")
            continue
        assert code == -signal.SIGKILL, said
        kills -= 1
        steps.append(newest(directory))
        found = re.search(r"resumed at step (\d+) of", said)
        if found and len(steps) > 1:
            assert int(found.group(1)) == steps[-2]
    complete(lab.start(method, directory))
    lab.check(method, directory)


def newest(directory):
    """The step a killed run will go on from, 0 for none.

    It is whole, and no more than one save interval was lost.
    """
    steps, step = saved(directory), 0
    if steps:
        step, _, extra = checkpoint.read_arrays(directory / "checkpoints", None)
        assert step == steps[-1] and extra["images"] == 32 * step
    seen = max((r["step"] for r in metrics.read(directory)), default=0)
    assert step <= seen <= step + SAVE_EVERY
    return step
