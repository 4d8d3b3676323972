"""The named plans of benchmarks.table, the gates of an HME, the memory of modules."""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys

import commands
import numpy as np
import pytest
import tiny

from benchmarks import gate_entropy, named_plans, table
from lakd_jax import errors
from lakd_jax.config import check, command_line, resolved
from lakd_jax.hme import network
from lakd_jax.runs import single
from lakd_jax.runtime import interrupt
from lakd_jax.training import phase


def test_subset_links_some_training_images_and_all_of_the_test_split(tmp_path):
    counts, made = {"train": 5, "test": 3}, tmp_path / "some"
    names = [
        f"{r}/{c}/{i}.png" for r, n in counts.items() for c in "ab" for i in range(n)
    ]
    for name in names:
        file = tmp_path / "all" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    for _ in range(2):  # a second call finds all of it
        named_plans.link_subset(tmp_path / "all", 2, made)
    found = {str(p.relative_to(made)): p.read_text() for p in made.rglob("*.png")}
    assert found == {n: n for n in names if not re.fullmatch("train/./[2-4].png", n)}


def series(name, *flags):
    (found,) = table.series_of(table.parse(["--plan", name, *flags]))
    return found


@pytest.mark.parametrize("name", named_plans.PLANS)
def test_records_are_of_their_plans(name):
    found, file = series(name), table.RESULTS / f"{name}.json"
    recorded = json.loads(file.read_text()) if file.exists() else {}
    # Reading them compares their commands.
    assert found.store.read(found.jobs).keys() == recorded.keys()


@pytest.mark.parametrize("name", ["digits", "experts"])
def test_a_plan_prints_the_table_of_results(name):
    found = series(name)
    text = found.render(found.store.read(found.jobs))
    assert (
        len(text.splitlines()) > 5
        and text in (commands.ROOT / "RESULTS.md").read_text()
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_commands_in_the_documents_make_runs_without_faults(monkeypatch):
    monkeypatch.chdir(commands.ROOT)
    every = ["--plan converged converged_more converged_resnet20 converged_cifar100"]
    for name in ("RESULTS.md", "README.md", "docs/guide.md"):
        text = (commands.ROOT / name).read_text().replace("\\\n", "")
        every += re.findall(r"^python -m benchmarks.table (.*)$", text, re.M)
    assert len(every) > 12
    for command in every:
        flags = shlex.split(command.replace("METHODS", "none,kd"))
        for found in table.series_of(table.parse(flags)):
            for job in {job.label: job for job in found.jobs}.values():
                config, _, _ = command_line.parse([*job.argv])
                assert check.problems(config, 1) == [], job


def test_a_plan_needs_its_folders_and_nothing_of_a_table(tmp_path):
    found = series("experts_undecayed", f"--record={tmp_path}")
    with pytest.raises(errors.ConfigError, match="--images: .*\n--weights: "):
        found.prepare(found.jobs)
    for flags, line in (
        (["--plan", "vam", "--seeds=1"], "--seeds: cannot be given with --plan"),
        (["--weights=w"], "--weights: cannot be given without --plan"),
        (["--data=digits"], "--pairs: is missing"),
    ):
        with pytest.raises(errors.ConfigError, match=line):
            table.series_of(table.parse(flags))


def test_runs_of_a_plan_are_recorded_as_on_any_machine(tmp_path, monkeypatch):
    def process(argv, directory, guard):
        started.append(argv)
        if len(started) == 1:
            return {"error": "ValueError: no"}
        directory.mkdir(parents=True)
        (directory / "environment.json").write_text('{"versions": {"jax": "1"}}')
        (directory / "result.json").write_text('{"seconds": 1.0}')
        return {"memory": None}

    monkeypatch.setattr(table, "_process", process)
    flags = [f"--{place}={tmp_path}/{place}" for place in ("images", "weights")]
    flags += [f"--out={tmp_path}/out", f"--record={tmp_path}/kept"]
    found, started = dataclasses.replace(series("vam", *flags), render=str), []
    for count in (2, 3, 3):  # a failure is not kept
        table.Harness(found, interrupt.Guard()).run(math.inf)
        assert len(started) == count
    kept = json.loads((tmp_path / "kept" / "vam.json").read_text())
    old = json.loads((table.RESULTS / "vam.json").read_text())
    assert kept.keys() == old.keys()
    for name, record in kept.items():
        assert record.keys() == old[name].keys()
        assert record["command"] == old[name]["command"]
    assert f"--config.data.source=folder:{tmp_path}/images" in started[0]
    assert f"--workdir={tmp_path}/out/vam/with_VAM-0" in started[1]


@pytest.mark.long
def test_untrained_gates_are_those_that_a_run_begins_with(tmp_path):
    fields = {"method": "none", "epochs": 1, "student__name": "hme", "seed": 3}
    config = resolved.resolve(tiny.config(tmp_path, **fields))
    with tiny.environment(train=80):
        environment = single.environment(config, **tiny.quiet())
    first = phase.first(config)
    job = single.training_job(first, tmp_path, environment, None)
    began = network.gates(job.record.first_state().params["student"])
    found = network.gates(gate_entropy.untrained(3, job.student.model))
    other = network.gates(gate_entropy.untrained(4, job.student.model))
    for mine, wanted, foreign in zip(found, began, other, strict=True):
        np.testing.assert_array_equal(mine, wanted)
        assert np.any(mine != foreign)


@pytest.mark.long
def test_largest_module_needs_less_memory_than_the_whole():
    # Property 20 of LAKD, with the schedule that XLA uses where memory matters.
    command = [sys.executable, "-m", "benchmarks.memory", "--pair=resnet8,resnet8"]
    flags = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    done = subprocess.run(
        [*command, "--batch=16", "--modules=1,3"],
        cwd=commands.ROOT,
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
