"""The packages themselves, offline, in processes that are killed and go on."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import commands
import pytest

pytestmark = pytest.mark.long

SCRIPT = """\
import os, signal, sys
from lakd_jax.report import metrics
from lakd_jax.trackers import tracker

name, folder, first, last, resume, kill = sys.argv[1:]
about = tracker.About("kd/seed0", "kd", "kd", {"optim.lr": 0.1, "seeds": (), "a": ""})
signals = (signal.SIGINT, signal.SIGTERM)
before = [signal.getsignal(s) for s in signals]
writer = metrics.MetricWriter(
    folder, resume_step=int(resume) or None, trackers=(name,), about=about
)
with writer:
    assert [signal.getsignal(s) for s in signals] == before
    for step in range(int(first), int(last)):
        writer.write(step, "train", {"loss": 1 / step})
        if step % 2 == 0:
            writer.write(step, "eval", {"accuracy": step / 10})
    if kill == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""
EXPECTED = [
    record
    for step in range(1, 9)
    for record in (
        (step, {"train/loss": 1 / step}),
        *([(step, {"eval/accuracy": step / 10})] if step % 2 == 0 else []),
    )
]


def run(package, folder, *args):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, package, folder, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=commands.ROOT,
        env={
            **os.environ,
            "HOME": str(folder.parent),
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(folder.parent / "trackio"),
        },
    )
    assert "warning" not in done.stderr, done.stderr
    return done.returncode


def killed_and_resumed(package, folder):
    """Eight steps; killed after six, of which four are in a checkpoint."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert run(package, folder, 1, 7, 0, "kill") == -9
    assert run(package, folder, 5, 9, 4, "") == 0


def rows_of_wandb(file):
    """The rows in a file of wandb: records of LevelDB's log format, if they are few."""
    from wandb.proto import wandb_internal_pb2

    content, rows = file.read_bytes()[7:], []
    assert len(content) < 32 * 1024  # in one block no record is split
    while content:
        size = int.from_bytes(content[4:6], "little")
        record = wandb_internal_pb2.Record.FromString(content[7 : 7 + size])
        content = content[7 + size :]
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
            )
    return rows


def test_wandb_offline(tmp_path):
    """The folder of the last start has every row, each once; all are of one run."""
    killed_and_resumed("wandb", tmp_path / "run")
    kept = tmp_path / "run" / "trackers"
    identity = json.loads((kept / "wandb.json").read_text())["id"]
    folders = sorted((kept / "wandb").glob("offline-run-*"))
    assert [f.name.rpartition("-")[2] for f in folders] == [identity] * 2
    rows = rows_of_wandb(folders[-1] / f"run-{identity}.wandb")
    assert [row["_step"] for row in rows] == list(range(len(EXPECTED)))
    assert [
        (row["step"], {n: v for n, v in row.items() if "/" in n}) for row in rows
    ] == EXPECTED
    texts = [p.name for p in folders[-1].glob("files/*")]
    assert not {"requirements.txt", "wandb-metadata.json", "output.log"} & set(texts)


def test_trackio(tmp_path):
    """The database has one run with every record, each once."""
    killed_and_resumed("trackio", tmp_path / "run")
    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute(
        "select run_name, step, metrics from metrics order by id"
    )
    found = [(name, step, json.loads(values)) for name, step, values in rows]
    assert found == [("kd/seed0", step, values) for step, values in EXPECTED]
