"""A command hands all metrics of its runs to the trackers it names."""

import pytest
import tiny

from lakd_jax import register, trackers
from lakd_jax.report import metrics
from lakd_jax.runs import command
from lakd_jax.runtime import interrupt
from lakd_jax.trackers import tracker

pytestmark = pytest.mark.usefixtures("tiny_data")


@pytest.fixture
def seen(monkeypatch):
    """{name of a run: what a tracker "kept" received of it since its last start}."""
    monkeypatch.setattr(trackers, "_TABLE", dict(trackers._TABLE))
    found = {}

    class Kept(tracker.Tracker):
        def open(self, directory, about, resume_step):
            self.name, self.records = about.name, []
            found[about.name] = (about.group, about.job, self.records)

        def write(self, step, kind, values):
            self.records.append({"step": step, "kind": kind, **values})

    register.tracker("kept", Kept)
    return found


def run(config, directory, guard=None):
    guard = guard or interrupt.Guard()
    command.run(config, directory, guard=guard, notify=lambda line: None)


@pytest.mark.long
def test_a_stopped_run_is_tracked_as_a_whole_run_also_from_its_middle(tmp_path, seen):
    """Promise 12: no record is missing, and none comes twice."""
    fields = {"method": "none", "epochs": 2, "log_every": 3, "compile_cache": ""}
    with pytest.raises(interrupt.Interrupted):
        run(
            tiny.small(tmp_path, trackers=(), **fields),
            tmp_path / "kd",
            tiny.StopAfter(8),
        )
    assert metrics.read(tmp_path / "kd") and not seen
    run(tiny.small(tmp_path, trackers=("kept",), **fields), tmp_path / "kd")
    assert seen == {"kd": ("kd", "none", metrics.read(tmp_path / "kd"))}
    assert not list((tmp_path / "kd").glob("events*"))


@pytest.mark.long
def test_seeds_baselines_and_the_teacher_are_runs_of_one_group(tmp_path, seen):
    fields = {"method": "kd", "baselines": ("none",), "epochs": 1, "seeds": (0, 1)}
    config = tiny.small(tmp_path, trackers=("kept",), compile_cache="", **fields)
    run(config, tmp_path / "kd")
    teacher = [name for name in seen if name.startswith(f"{tiny.NETWORK}-")]
    jobs = {name: job for name, (group, job, _) in seen.items() if group == "kd"}
    assert jobs == {teacher[0]: "teacher"} | {
        f"kd/seed{seed}{below}": job
        for seed in (0, 1)
        for below, job in (("", "kd"), ("/none", "none"))
    }
    for name, (_, _, records) in seen.items():
        if name.startswith("kd/"):
            assert records == metrics.read(tmp_path / name)
