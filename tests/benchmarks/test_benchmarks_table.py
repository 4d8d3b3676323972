"""benchmarks.table: the runs, what is made again, the statistics and the text."""

import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import commands
import jax
import numpy as np
import pytest
import tiny

from benchmarks import intervals, plan, published, records, table, table_text
from lakd_jax import errors
from lakd_jax.config import check, command_line, resolved
from lakd_jax.runs import single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.training import phase

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(autouse=True)
def _configs_are_found(monkeypatch):
    monkeypatch.chdir(commands.ROOT)


def request(out, **changes):
    fields = {
        "data": "cifar100",
        "pairs": (("resnet56", "resnet20"),),
        "arms": plan.methods("none,kd,dkd+at"),
        "seeds": (0, 1),
        "epochs": 0,
        "overrides": (),
        "teachers": {},
        "out": out,
    }
    return plan.Request(**(fields | changes))


def parsed(job):
    """The config and the run's directory of a job's command."""
    return command_line.parse([*job.argv])[:2]


def result(last, best=None, *, seconds=60.0, teacher=0.75):
    def score(accuracy):
        return {"accuracy": accuracy, "right": 0, "examples": 100, "loss": 0.0}

    return {
        "test_last": score(last),
        "test_best_on_minival": score(best) if best else None,
        "teacher_test": score(teacher) if teacher else None,
        "seconds": seconds,
        "images_per_second": 1234.0,
        "epochs": 240,
    }


def leave_environment(folder):
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"versions": {}, "commit": "c0ffee", "devices": ["0: x"], "platform": "l"}
    (folder / "environment.json").write_text(json.dumps(fields))


def keep(out, job, **ended):
    leave_environment(job.directory)
    if "result" in ended:
        ended = {"memory": {"device": None, "process": 3 * 2**20}} | ended
    records.Folder(out / "records").add(job, ended)


def read(out, jobs):
    return records.Folder(out / "records").read(jobs)


def cells(text, first):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_plan_is_seed_by_seed_with_each_teacher_once_and_first(tmp_path):
    pairs = (("resnet56", "resnet20"), ("resnet56", "resnet8"))
    found = plan.jobs(request(tmp_path, pairs=pairs))
    assert [job.name for job in found] == [
        "resnet56-resnet20/none/seed0",
        "teachers/resnet56",
        "resnet56-resnet20/kd/seed0",
        "resnet56-resnet20/dkd+at/seed0",
        *(f"resnet56-resnet8/{m}/seed0" for m in ("none", "kd", "dkd+at")),
        *(
            f"resnet56-{s}/{m}/seed1"
            for s in ("resnet20", "resnet8")
            for m in ("none", "kd", "dkd+at")
        ),
    ]
    needs = {job.name for job in found if job.teacher == "teachers/resnet56"}
    assert len(needs) == 8 and not any("/none/" in name for name in needs)


def test_commands_are_those_of_the_recipe_and_have_no_fault(tmp_path):
    wanted = request(
        tmp_path,
        pairs=(("vgg13", "mobilenet_v2"),),
        epochs=24,
        overrides=("batch_size=32", "teacher.mean=(0.1, 0.2, 0.3)"),
    )
    jobs = {job.name: job for job in plan.jobs(wanted)}
    job = jobs["vgg13-mobilenet_v2/dkd+at/seed1"]
    c, directory = parsed(job)
    assert check.problems(c, 1) == []
    assert (c.teacher.name, c.student.name) == ("vgg13", "mobilenet_v2")
    assert (c.method, c.seed, c.baselines, c.epochs) == ("dkd+at", 1, (), 24)
    np.testing.assert_allclose(c.optim.milestones, (15, 18, 21))
    assert (c.optim.lr, c.dkd.beta, c.dkd.warmup_epochs) == (0.01, 6.0, 2.0)
    assert c.batch_size == 32 and c.teacher.mean == (0.1, 0.2, 0.3)
    assert pathlib.Path(directory) == job.directory
    own, folder = parsed(jobs["teachers/vgg13"])
    assert (own.student.name, own.method, own.seeds) == ("vgg13", "none", ())
    assert (own.optim.lr, own.epochs, own.teacher.mean) == (0.05, 24, ())
    assert c.teacher.init == folder


def test_digits_and_folders_have_their_recipes(tmp_path):
    pairs = (("resnet14", "resnet8"),)
    c, _ = parsed(plan.jobs(request(tmp_path, data="digits", pairs=pairs))[-1])
    assert (c.data.source, c.epochs, c.optim.schedule) == ("digits", 10, "cosine")
    assert (c.teacher.name, c.student.name) == ("resnet14", "resnet8")
    assert c.dkd.warmup_epochs == pytest.approx(20 * 10 / 240)
    c, _ = parsed(plan.jobs(request(tmp_path, data="folder:a/b", pairs=pairs))[-1])
    assert (c.data.source, c.epochs) == ("folder:a/b", 240)
    assert c.data.std == (0.2470, 0.2435, 0.2616)


def test_given_teacher_is_not_trained(tmp_path):
    jobs = plan.jobs(request(tmp_path, teachers={"resnet56": "some/file.pth"}))
    assert not [job for job in jobs if job.seed is None or job.teacher]
    c, _ = parsed(jobs[1])
    assert c.method == "kd" and c.teacher.init == "some/file.pth"


def test_an_arm_changes_fields_of_its_own(tmp_path):
    arm = plan.arm("KD T=2=kd:kd.temperature=2,teacher.mean=(0,0)")
    arms = (*plan.methods("kd"), arm)
    jobs = plan.jobs(request(tmp_path, arms=arms, overrides=("dtype=bfloat16",)))
    names = [job.name.removeprefix("resnet56-resnet20/") for job in jobs[:3]]
    assert names == ["teachers/resnet56", "kd/seed0", "KD_T=2/seed0"]
    where = jobs[1].settings.index("--config.dtype=bfloat16") + 1
    changed = ("--config.kd.temperature=2", "--config.teacher.mean=(0,0)")
    assert jobs[2].settings[where : where + 2] == changed
    assert {*jobs[2].settings} - {*changed} == {*jobs[1].settings}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"overrides": ("seeds=1",)}, "--override=seeds=1: the table sets seeds "),
        ({"overrides": ("dtype",)}, "--override=dtype: must be FIELD=VALUE"),
        ({"teachers": {"vgg13": "x"}}, "--teacher=vgg13=...: no pair has the teacher"),
        ({"arms": (plan.arm("A=kd:seed=1"),)}, "--arm=A: seed=1: the table sets seed"),
        ({"arms": 2 * (plan.arm("A=kd"),)}, "--arm=A: two arms have this name"),
    ],
)
def test_what_the_table_sets_itself_is_refused(changes, line, tmp_path):
    with pytest.raises(errors.ConfigError, match=re.escape(line)):
        plan.require(request(tmp_path, **changes))


def test_pairs_and_methods_are_named_if_wrong():
    assert plan.pairs("a:b,c:d") == (("a", "b"), ("c", "d"))
    with pytest.raises(errors.ConfigError, match="'b' must be TEACHER:STUDENT"):
        plan.pairs("a:b,b")
    assert [a.title for a in plan.methods("none,dkd+at,none")] == ["alone", "DKD + AT"]
    with pytest.raises(errors.ConfigError, match="kdd"):
        plan.methods("none,kdd")
    for text in ("lakd", "a/b=kd", "LAKD=lakdd"):
        with pytest.raises(errors.ConfigError, match=f"--arm={text}: "):
            plan.arm(text)


def test_intervals_are_students():
    found = intervals.of([0.90, 0.92, 0.91])
    # mean 0.91, s = 0.01, t(0.975, 2) = 4.30265 of any table, sqrt(3)
    assert found.mean == pytest.approx(0.91)
    assert found.half == pytest.approx(4.30265 * 0.01 / 3**0.5, rel=1e-5)
    assert found.text() == "91.00 +- 2.48 (3)"
    two = intervals.of([0.5, 0.6])  # t(0.975, 1) = 12.7062, s = 0.0707107
    assert two.half == pytest.approx(12.7062 * 0.0707107 / 2**0.5, rel=1e-5)
    assert intervals.of([0.5]).text() == "50.00 (1)"
    assert intervals.of([]) is None


def test_pairs_of_seeds_take_out_what_they_share():
    ours = {0: 0.50, 1: 0.61, 2: 0.72, 7: 0.9}
    theirs = {0: 0.49, 1: 0.59, 2: 0.69, 5: 0.1}
    found = intervals.paired(ours, theirs)
    assert found.count == 3 and found.mean == pytest.approx(0.02)
    assert found.half == pytest.approx(4.30265 * 0.01 / 3**0.5, rel=1e-5)
    assert found.text(sign=True) == "+2.00 +- 2.48 (3)"
    assert intervals.paired({0: 1.0}, {1: 1.0}) is None


def test_table_has_results_failures_what_is_missing_and_what_is_published(tmp_path):
    arms = (*plan.methods("none,kd,dkd+at"), plan.arm("KD T 2=kd:kd.temperature=2"))
    wanted = request(tmp_path, arms=arms)
    jobs = plan.jobs(wanted)
    by = {job.name.removeprefix("resnet56-resnet20/"): job for job in jobs}
    keep(tmp_path, by["none/seed0"], result=result(0.68, teacher=None))
    keep(tmp_path, by["none/seed1"], error="NonFiniteError: loss | is nan\nmore")
    keep(tmp_path, by["teachers/resnet56"], result=result(0.7, teacher=None))
    for seed, last in ((0, 0.70), (1, 0.72)):
        keep(tmp_path, by[f"kd/seed{seed}"], result=result(last, best=last + 0.01))
    keep(tmp_path, by["dkd+at/seed1"], result=result(0.73, seconds=30))
    keep(tmp_path, by["KD_T_2/seed0"], result=result(0.69))
    text = table_text.render(wanted, jobs, read(tmp_path, jobs))
    assert "### resnet56 -> resnet20" in text
    assert cells(text, "method")[3] == "last - KD"
    assert cells(text, "resnet56, teacher")[1] == "75.00"  # as the students had it
    assert cells(text, "resnet56, teacher")[7] == "72.34 (R)"
    alone = cells(text, "alone  ")
    assert alone[1:4] == ["68.00 (1)", "-", "-2.00 (1)"]
    assert alone[7] == "69.06 (R)"
    failed = cells(text, "alone, seed 1")
    assert failed[1] == "-" and failed[-1] == "failed: NonFiniteError: loss \\| is nan"
    half = 12.7062 * 2**0.5 / 2**0.5  # of 70 and 72
    kd = cells(text, "KD ")
    assert kd[1:4] == [f"71.00 +- {half:.2f} (2)", f"72.00 +- {half:.2f} (2)", "-"]
    assert kd[4:8] == ["1,234", "3", "0:01:00", "70.66 (R)"]
    both = cells(text, "DKD + AT")
    assert both[1:4] == ["73.00 (1)", "-", "+1.00 (1)"]  # to seed 1 of KD
    assert both[6:8] == ["0:00:30", "-"]
    assert both[-1] == "not run: seed 0"
    changed = cells(text, "KD T 2 ")
    assert changed[3] == "-1.00 (1)" and changed[7] == "-"  # published is plain KD
    assert "R: RepDistiller's README" in text and "the process" in text
    assert "240 epochs; 0: x; commit c0ffee." in text


def test_table_of_nothing_lists_missing_seeds(tmp_path):
    wanted = request(tmp_path, data="digits")
    text = table_text.render(wanted, plan.jobs(wanted), {})
    assert cells(text, "KD ")[1:] == ["-"] * 7 + ["not run: seed 0, 1"]
    assert "Published" not in text


def test_published_numbers_are_of_the_tables():
    def top1(data, pair, method):
        row = published.find(data, pair, method)
        return (row["top1"], row["source"]) if row else None

    assert top1("cifar100", "resnet32x4:resnet8x4", "dkd") == (76.32, "L")
    assert top1("cifar100", "resnet32x4:resnet8x4", "review") == (75.63, "N")
    assert top1("cifar100", "resnet32x4:shuffle_v2", "kd") == (74.45, "R")
    assert top1("cifar100", "vgg13:vgg8", "none") == (70.36, "R")
    assert top1("imagenet", "resnet34:resnet18", "dkd") == (71.70, "S")
    assert top1("cifar100", "resnet56:resnet20", "lakd") is None
    assert top1("cifar10", "resnet56:resnet20", "kd") is None
    tables = published.tables()
    for data in ("cifar100", "imagenet"):
        for rows in tables[data].values():
            assert {row["source"] for row in rows.values()} <= tables["sources"].keys()


class Made:
    """Stands in for the processes: each leaves a result, or an error."""

    def __init__(self, monkeypatch, fail=(), stop_at=None, during_first=lambda: None):
        self.commands, self._fail, self._stop = [], fail, stop_at
        self._during_first = during_first
        monkeypatch.setattr(table, "_process", self)

    def __call__(self, command, directory, guard):
        if self._stop == len(self.commands):
            raise interrupt.Interrupted
        self.commands.append(command)
        if len(self.commands) == 1:
            self._during_first()
        if any(word in " ".join(command) for word in self._fail):
            return {"error": "ValueError: no"}
        leave_environment(directory)
        (directory / "result.json").write_text(json.dumps(result(0.5)))
        return {"memory": {"device": 2**20, "process": 0}}


def harness(wanted, *, retry=False):
    return table.Harness(table._table(wanted), interrupt.Guard(), retry)


def test_stopped_table_continues_with_what_is_missing(tmp_path, monkeypatch):
    wanted = request(tmp_path)
    first = Made(monkeypatch, stop_at=3)
    with pytest.raises(interrupt.Interrupted):
        harness(wanted).run(math.inf)
    second = Made(monkeypatch)
    harness(wanted).run(math.inf)
    made = first.commands + second.commands
    assert len(made) == len({*map(tuple, made)}) == 7
    third = Made(monkeypatch)
    harness(wanted).run(math.inf)
    assert third.commands == []
    assert cells((tmp_path / "table.md").read_text(), "KD ")[1].endswith("(2)")


def test_processes_share_the_runs(tmp_path, monkeypatch):
    wanted = request(tmp_path)
    ours, other = harness(wanted), harness(wanted)
    made = Made(monkeypatch, during_first=lambda: other.run(math.inf))
    ours.run(math.inf)
    assert len(made.commands) == len({*map(tuple, made.commands)}) == 7
    assert cells(other.table(), "alone")[-1] == "not run: seed 0"  # was not free
    assert cells(ours.table(), "alone")[-1] == "" == cells(ours.table(), "KD ")[-1]


def test_a_teacher_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    def sleep(seconds):
        assert len(made.commands) == 2  # both students without a teacher
        keep(tmp_path, teacher, result=result(0.7))

    wanted, made = request(tmp_path), Made(monkeypatch)
    teacher = next(job for job in plan.jobs(wanted) if job.seed is None)
    monkeypatch.setattr(table.time, "sleep", sleep)
    with records.claimed(teacher.directory):
        harness(wanted).run(math.inf)
    assert len(made.commands) == 6


def test_failure_is_kept_and_a_failed_teachers_students_are_not_begun(
    tmp_path, monkeypatch, capsys
):
    wanted = request(tmp_path)
    made = Made(monkeypatch, fail=("resnet56,resnet56",))
    harness(wanted).run(math.inf)
    assert len(made.commands) == 3  # the teacher and both students without one
    assert "resnet56, teacher failed: ValueError: no" in capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    assert cells(text, "resnet56, teacher")[-1] == "failed: ValueError: no"
    assert cells(text, "KD ")[-1] == "not run: seed 0, 1"
    assert harness(wanted).waiting() == []
    again = Made(monkeypatch)
    harness(wanted, retry=True).run(math.inf)
    assert len(again.commands) == 5


def test_budget_that_is_used_up_starts_nothing(tmp_path, monkeypatch, capsys):
    made = Made(monkeypatch)
    harness(request(tmp_path)).run(time.monotonic() - 1)
    assert made.commands == []
    assert "The budget is used up" in capsys.readouterr().out


def test_records_of_another_command_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    Made(monkeypatch)
    harness(request(tmp_path)).run(math.inf)
    with pytest.raises(errors.WorkdirError, match=r"(?s)epochs=24.*Use another --out"):
        harness(request(tmp_path, epochs=24))


def test_estimate_is_from_the_same_method_else_from_the_pair(tmp_path):
    pairs = (("resnet56", "resnet20"), ("vgg13", "vgg8"))
    wanted = request(tmp_path, pairs=pairs)
    jobs = plan.jobs(wanted)
    by = {job.name: job for job in jobs}
    done = ["resnet56-resnet20/none/seed0", "resnet56-resnet20/kd/seed0"]
    for name, seconds in zip(done, (100.0, 300.0), strict=True):
        keep(tmp_path, by[name], result=result(0.5, seconds=seconds))
    kept = read(tmp_path, jobs)
    waiting = [job for job in jobs if job.name not in kept]
    # none, kd and two times the mean of both; of two teachers and of vgg8 nothing
    seconds, unknown = records.estimate(waiting, jobs, kept)
    assert (seconds, unknown) == (100 + 300 + 2 * 200, 2 + 6)
    text = harness(wanted).plan_text()
    assert "resnet56 -> resnet20, none, seed 0, 1: 1 to make, 1 finished" in text
    assert text.endswith(
        "runs left: 12, about 0:13:20 without the 8 of pairs not timed yet"
    )


@pytest.mark.long
def test_methods_of_a_seed_see_the_same_images_in_the_same_order(tmp_path):
    """The rows of every batch, and the keys that crops and mirrors follow from."""
    fields = {"method": "kd", "epochs": 2}
    config = resolved.resolve(tiny.config(tmp_path, **fields))
    with tiny.environment(train=40):
        environment = single.environment(config, **tiny.quiet())
    teacher = teacher_lib.stand_in(config, environment)

    def seen(method, seed):
        job = single.training_job(
            phase.first(dataclasses.replace(config, method=method, seed=seed)),
            tmp_path,
            environment,
            teacher,
        )
        steps = job.record.plan.total_steps
        rows = [job.record.rows(step, 1)[0] for step in range(steps)]
        rows = [row[row >= 0].tolist() for row in rows]  # some methods fill them up
        keys = [jax.random.key_data(k).tolist() for k in (job.data.key, job.data.noise)]
        return rows, keys, (job.spec.pad, job.spec.flip)

    first = seen("none", 0)
    assert len(first[0]) == 6 and first[0][:3] != first[0][3:]
    assert seen("dkd+at", 0) == first
    other = seen("none", 1)
    assert other[0] != first[0] and other[1] != first[1]


@pytest.mark.long
def test_command_on_digits_is_stopped_continues_and_then_only_prints(tmp_path):
    command = [sys.executable, "-m", "benchmarks.table", "--data=digits"]
    command += ["--pairs=resnet8:resnet8", "--methods=none", "--seeds=1", "--epochs=1"]
    command += ["--arm=KD T 2=kd:kd.temperature=2", "--budget=1", f"--out={tmp_path}"]
    command += ["--override=teacher.floor=0.01"]
    folder = tmp_path / "records"

    def run():
        done = subprocess.run(
            command, cwd=commands.ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with subprocess.Popen(
        command, cwd=commands.ROOT, stdout=subprocess.DEVNULL
    ) as first:
        while not list(folder.rglob("*.json")):
            assert first.poll() is None
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 0
    kept = {p: p.read_bytes() for p in folder.rglob("*.json")}
    text = run()
    assert 1 <= len(kept) < 3 and {p: p.read_bytes() for p in kept} == kept
    (kd,) = (json.loads(p.read_text()) for p in folder.rglob("KD_T_2/seed0.json"))
    assert kd["result"]["epochs"] == 1 and kd["memory"]["process"] > 2**20
    assert kd["command"].startswith("python main.py --config=configs/digits_lakd.py:kd")
    assert kd["versions"]["jax"] == jax.__version__ and "cpu" in kd["devices"][0]
    every = {p: os.stat(p).st_mtime_ns for p in folder.rglob("*.json")}
    again = run()
    assert {p: os.stat(p).st_mtime_ns for p in folder.rglob("*.json")} == every
    assert len(every) == 3 and "runs left: 0" in again
    assert cells(again, "KD T 2 ") == cells(text, "KD T 2 ")
