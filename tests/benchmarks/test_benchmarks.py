"""What benchmarks.compare needs beside main.py: a subset, the gates of a run."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from lakd_jax import cli
from lakd_jax import config as config_lib
from lakd_jax.config import check
from lakd_jax.hme import network
from lakd_jax.runs import phases, single
from lakd_jax.runtime import interrupt
from lakd_jax.training import state as state_lib

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_subset_links_some_training_images_and_all_of_the_test_split(tmp_path):
    from benchmarks import compare

    for role, count in (("train", 5), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "all" / role / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_text(f"{role} {name} {i}")
    for _ in range(2):  # a second call finds all of it
        made = compare.subset(tmp_path / "all", 2, tmp_path / "some")
    found = {
        str(p.relative_to(made)): p.read_text() for p in sorted(made.rglob("*.png"))
    }
    wanted = [("test", 3), ("train", 2)]
    assert found == {
        f"{role}/{name}/{i}.png": f"{role} {name} {i}"
        for role, count in wanted
        for name in ("cat", "dog")
        for i in range(count)
    }


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_every_arm_of_the_long_plans_is_a_config_without_faults():
    from benchmarks import compare

    for name in (n for n in compare.PLANS if n.startswith("converged")):
        plan = compare.PLANS[name]()
        for arm, (arg, fields) in plan.arms.items():
            command = [f"--config={ROOT / plan.config}:{arg}"]
            command += [f"--config.{field}" for field in [*fields, "seed=1"]]
            config, _, _ = cli.parse(command)
            assert check.problems(config, 1) == [], (name, arm)


def test_processes_share_the_runs_of_a_plan(tmp_path, monkeypatch):
    from benchmarks import compare

    def run_one(command, places, directory, guard):
        if directory.name == "a-0":  # a second process comes meanwhile
            done = compare.run(plan, {}, tmp_path / "out", record, guard)
            assert done == "b 1, c 2"
        made.append(directory.name)
        return {"result": len(made)}

    made, record = [], tmp_path / "results" / "plan.json"
    monkeypatch.setattr(compare, "_run_one", run_one)
    plan = compare.Plan(
        "x.py",
        {name: ("", []) for name in "abc"},
        range(1),
        render=lambda kept: ", ".join(f"{n} {r['result']}" for n, r in kept),
    )
    guard = interrupt.Guard()
    text = compare.run(plan, {}, tmp_path / "out", record, guard)
    assert text == "a 3, b 1, c 2"
    assert made == ["b-0", "c-0", "a-0"]  # each once
    assert compare.run(plan, {}, tmp_path / "out", record, guard) == text
    assert len(made) == 3


@pytest.mark.long
def test_untrained_gates_are_those_that_a_run_begins_with(tmp_path, monkeypatch):
    from benchmarks import gate_entropy

    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(single.data, "load", lambda *a, **k: tiny.dataset(train=80))
    monkeypatch.setattr(state_lib, "data_mesh", lambda: one)
    fields = {"method": "none", "epochs": 1, "student__name": "hme", "seed": 3}
    config = config_lib.resolve(tiny.config(tmp_path, **fields))
    bench = single.bench(config, interrupt.Guard(), lambda text: None)
    own = phases.parts(config, tmp_path, bench, None)
    began = network.gates(own.track.first_state().params["student"])
    told = network.gates(gate_entropy.untrained(3, own.student.model))
    other = network.gates(gate_entropy.untrained(4, own.student.model))
    for mine, wanted, foreign in zip(told, began, other, strict=True):
        np.testing.assert_array_equal(mine, wanted)
        assert np.any(mine != foreign)


def test_table_of_gates_is_of_stage_1():
    from benchmarks import gate_entropy

    def record(right, level):
        told = {"levels": [level, 0.5, 0.5], "mean": level}
        gates = {"0.5": told, "1": {**told, "mean": 1.0}}
        first = {"0.5": {**told, "mean": 0.75}, "1": told}
        result = {"test_last": {"accuracy": 0.1}}  # of stage 2
        result["stage1"] = {"test_last": {"accuracy": right}}
        return {"gates": {"stage1": gates, "untrained": first}, "result": result}

    kept = [("KD", record(0.4, 0.25)), ("KD", record(0.6, 0.35))]
    lines = gate_entropy.render(kept).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:4] == ["method", "test %", "entropy, tau 0.5", "entropy, tau 1"]
    assert cells[2][:3] == ["untrained", "-", "0.7500 +- 0.0000 (2)"]
    assert cells[3][:2] == ["KD", "50.00 +- 14.14 (2)"]
    assert cells[3][2:5] == [
        "0.3000 +- 0.0707 (2)",
        "1.0000 +- 0.0000 (2)",
        "0.3000 +- 0.0707 (2)",
    ]


@pytest.mark.long
def test_largest_module_needs_less_memory_than_the_whole():
    # Property 20 of LAKD, with the schedule that XLA uses where memory matters.
    command = [sys.executable, "-m", "benchmarks.memory", "--pair=resnet8,resnet8"]
    flags = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    done = subprocess.run(
        [*command, "--batch=16", "--modules=1,3"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("|") for line in done.stdout.splitlines() if "%" in line]
    fused, dispatched, student = ([float(r[i]) for r in rows] for i in (2, 4, 6))
    assert len(rows) == 2
    assert dispatched == sorted(dispatched, reverse=True)
    assert dispatched[-1] < dispatched[0] and dispatched[-1] < fused[0]
    assert fused[-1] <= fused[0]
    assert student[-1] < student[0] and max(student) <= max(dispatched)
