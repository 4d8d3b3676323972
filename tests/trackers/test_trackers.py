"""Trackers by name, and what they receive; wandb and trackio are stand-ins here."""

import json
import sys
import types

import pytest
import tiny

from lakd_jax import data, register, trackers
from lakd_jax.config import check, resolved
from lakd_jax.report import metrics
from lakd_jax.runs import single, tracking
from lakd_jax.store import workdir
from lakd_jax.trackers import tracker

ABOUT = tracker.About("kd/seed0", "kd", "dkd", {"optim.lr": 0.1, "optim.name": "sgd"})


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(trackers, "_TABLE", dict(trackers._TABLE))


class Kept(tracker.Tracker):
    """Keeps what it receives in a class attribute, which each test makes anew."""

    seen = ()

    def open(self, directory, about, resume_step):
        self.seen.append(("open", directory, about, resume_step))

    def write(self, step, kind, values):
        self.seen.append((step, kind, dict(values)))

    def close(self, failed):
        self.seen.append(("close", failed))


def kept(name="kept", **methods):
    """Registers a tracker with these attributes; returns what it receives."""
    cls = type(name, (Kept,), {"seen": [], **methods})
    register.tracker(name, cls)
    return cls.seen


def write(directory, steps, name, resume_step=None, warn=None):
    with metrics.MetricWriter(
        directory, resume_step=resume_step, trackers=(name,), about=ABOUT, warn=warn
    ) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": 1 / step})


def faults(tmp_path, *names):
    return check.problems(tiny.config(tmp_path, trackers=names), 1)


# ----------------------------------------------------------------------------- names


def test_a_tracker_is_known_by_its_name(tmp_path):
    kept("mine")
    assert faults(tmp_path, "mine", "tensorboard") == []
    (line,) = faults(tmp_path, "mime")
    assert line.startswith("trackers is 'mime'; did you mean 'mine'?")


@pytest.mark.parametrize(
    ("name", "cls", "words"),
    [
        ("wandb", Kept, "is built in"),
        ("My tracker", Kept, "word in small letters"),
        ("mine", dict, "no subclass of Tracker"),
    ],
)
def test_what_cannot_be_registered(name, cls, words):
    with pytest.raises(ValueError, match=words):
        register.tracker(name, cls)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_with_the_field_before_any_work(
    name, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    (line,) = faults(tmp_path, name)
    assert line.startswith("trackers must ")
    assert f'pip install "lakd-jax[{name}]"' in line and "\n" not in line
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert faults(tmp_path, name) == []


def test_the_package_of_a_registered_tracker(tmp_path):
    kept("mine", package="nowhere_to_be_found")
    (line,) = faults(tmp_path, "mine")
    assert "pip install nowhere_to_be_found," in line


# --------------------------------------------------------------------------- writing


def test_a_tracker_receives_every_record_and_the_end(tmp_path):
    seen = kept()
    write(tmp_path / "run", [1, 2], "kept")
    records = [(1, "train", {"loss": 1.0}), (2, "train", {"loss": 0.5})]
    assert seen == [
        ("open", tmp_path / "run", ABOUT, None),
        *records,
        ("close", False),
    ]


def test_an_error_of_the_run_is_told(tmp_path):
    seen = kept()
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, [0], "kept")
    assert seen[-1] == ("close", True)


@pytest.mark.parametrize(("replay", "steps"), [(True, range(1, 8)), (False, (5, 6, 7))])
def test_a_resumed_run_is_replayed_to_who_asks_for_it(tmp_path, replay, steps):
    """Up to the restored step: later ones are written again by training."""
    seen = kept(replay=replay)
    write(tmp_path, range(1, 7), "kept")
    seen.clear()
    write(tmp_path, range(5, 8), "kept", resume_step=4)
    assert seen[1:-1] == [(step, "train", {"loss": 1 / step}) for step in steps]
    assert seen[0][-1] == 4


@pytest.mark.parametrize("method", ["open", "write", "close"])
def test_one_that_fails_is_reported_once_and_the_others_go_on(tmp_path, method):
    """Promise 34: a tracker, like a full disk."""

    def fail(self, *args, **kwargs):
        raise RuntimeError("no network\nat all")

    bad, good, warnings = kept("bad", **{method: fail}), kept("good"), []
    with metrics.MetricWriter(
        tmp_path, resume_step=None, trackers=("bad", "good"), warn=warnings.append
    ) as writer:
        for step in range(1, 5):
            writer.write(step, "train", {"loss": 1.0})
    (line,) = warnings
    assert f"tracker bad of {tmp_path}" in line and "RuntimeError: no network)" in line
    assert len(good) == len(metrics.read(tmp_path)) + 2 == 6
    assert len(bad) == {"open": 1, "write": 2, "close": 5}[method]


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
    from lakd_jax.runtime import hosts

    seen = kept()
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    write(tmp_path, [1], "kept")
    assert seen == [] and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------- what is said of a run


def test_names_groups_and_jobs(tmp_path):
    config, root = resolved.resolve(tiny.config(tmp_path, method="kd")), tmp_path / "kd"

    def told(directory, root=root):
        about = tracking.about(config, directory, root)
        return about.name, about.group, about.job

    assert told(root) == told(root, None) == ("kd", "kd", "kd")
    assert told(root / "seed0" / "none") == ("kd/seed0/none", "kd", "kd")
    elsewhere = tmp_path / "teachers" / "resnet56-0123"
    assert told(elsewhere) == ("resnet56-0123", "kd", "teacher")


def test_no_folder_and_no_secret_is_told(tmp_path, monkeypatch):
    def told(**fields):
        config = resolved.resolve(tiny.config(tmp_path / "secret", **fields))
        return tracking.about(config, tmp_path, None).config

    monkeypatch.setattr(data.sources, "_ADDED", {"mine": None})
    inits = {"student__init": "/secret/a.pth", "teacher__init": "/secret/b"}
    values = told(data__data_dir="/secret", compile_cache="/secret", **inits)
    assert "secret" not in str(values)
    assert (values["student.init"], values["teacher.init"]) == ("a.pth", "b")
    assert values["optim.lr"] == 0.05 and values["kd.temperature"] == 4.0
    for source, name in (
        ("folder:/secret/photos", "folder:photos"),
        ("npz:secret/a.npz", "npz:a.npz"),
        ("mine:secret", "mine"),
        ("cifar10", "cifar10"),
    ):
        assert told(data__source=source)["data.source"] == name


def test_a_run_may_be_resumed_with_other_trackers(tmp_path):
    """Promise 8: a run that was started before this field existed, too."""

    def prepare(**fields):
        config = resolved.resolve(tiny.config(tmp_path, **fields))
        with single.prepare(tmp_path / "run", config) as prepared:
            return prepared.resumed

    file = tmp_path / "run" / workdir.CONFIG
    assert not prepare()
    assert prepare(trackers=()) and workdir.read_json(file)["trackers"] == []
    workdir.write_json(
        file, {k: v for k, v in workdir.read_json(file).items() if k != "trackers"}
    )
    assert prepare(trackers=("wandb",))


# -------------------------------------------------------------------------- stand-ins


class Service:
    """Stands in for wandb and its service, which keeps the rows of a run by its id."""

    Settings = dict

    def __init__(self):
        self.rows, self.calls = {}, []

    def init(self, **options):
        self.calls.append(options)
        return ServiceRun(self, self.rows.setdefault(options["id"], []))


class ServiceRun:
    def __init__(self, service, rows):
        self.service, self.rows = service, rows

    @property
    def step(self):
        return len(self.rows)

    def define_metric(self, *args, **options):
        self.service.calls.append((*args, options))

    def log(self, values, *, step, commit):
        assert step == len(self.rows) and commit  # others would be dropped
        self.rows.append(values)

    def finish(self, exit_code):
        self.service.calls.append(exit_code)


def test_wandb_continues_its_run_and_has_each_row_once(tmp_path, monkeypatch):
    wandb = Service()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    write(tmp_path, range(1, 7), "wandb")
    write(tmp_path, range(5, 9), "wandb", resume_step=4)
    ((identity, rows),) = wandb.rows.items()
    assert rows == [{"step": s, "train/loss": 1 / s} for s in range(1, 9)]
    assert wandb.calls[:4] == [
        wandb.calls[0],
        ("step", {"hidden": True}),
        ("*", {"step_metric": "step"}),
        0,
    ]
    options = wandb.calls[0]
    assert options["config"] == {"optim": {"lr": 0.1, "name": "sgd"}}
    assert (options["name"], options["group"]) == ("kd/seed0", "kd")
    assert (options["job_type"], options["project"]) == ("dkd", "lakd_jax")
    assert options["resume"] == "allow" and options["settings"]["console"] == "off"
    assert options["dir"] == str(tmp_path / "trackers")
    file = json.loads((tmp_path / "trackers" / "wandb.json").read_text())
    assert file == {"id": identity}  # and no key


def test_wandb_whose_service_lost_rows_is_sent_them_again(tmp_path, monkeypatch):
    wandb = Service()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write(tmp_path, range(1, 7), "wandb")
    ((_, rows),) = wandb.rows.items()
    del rows[2:]  # 3 and 4 are behind the checkpoint, and training writes 5 and 6
    write(tmp_path, range(5, 9), "wandb", resume_step=4)
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_wandb_learns_of_a_failure(tmp_path, monkeypatch):
    wandb = Service()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, [0], "wandb")
    assert wandb.calls[-1] == 1


class Dashboard:
    """Stands in for trackio."""

    def __init__(self):
        self.database, self.calls = [], []

    def Api(self):
        return types.SimpleNamespace(runs=self.runs)

    def runs(self, project):
        if not self.database:
            raise ValueError(f"Project {project!r} does not exist")
        return list(self.database)

    def init(self, **options):
        self.calls.append(options)
        print("how to see the run")
        run = types.SimpleNamespace(id=f"id{len(self.calls)}", rows=[])
        run.log = lambda values, step: run.rows.append((step, values))
        run.finish = lambda: print("finished")
        run.delete = lambda: self.database.remove(run)
        self.database.append(run)
        return run


def test_trackio_has_one_run_with_each_record_once(tmp_path, monkeypatch, capsys):
    trackio = Dashboard()
    trackio.init(name="of someone else")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    capsys.readouterr()
    write(tmp_path, range(1, 7), "trackio")
    trackio.database[-1].rows.pop(2)  # lost in a kill
    write(tmp_path, range(5, 9), "trackio", resume_step=4)
    assert capsys.readouterr().out == ""
    assert [run.id for run in trackio.database] == ["id1", "id3"]
    rows = trackio.database[-1].rows
    assert rows == [(step, {"train/loss": 1 / step}) for step in range(1, 9)]
    trackio.database.clear()  # as if killed before anything was written
    write(tmp_path, [5], "trackio", resume_step=4)
    assert [len(run.rows) for run in trackio.database] == [5]
    options = trackio.calls[-1]
    assert (options["name"], options["group"]) == ("kd/seed0", "kd")
    assert options["config"] == {"optim.lr": 0.1, "optim.name": "sgd", "job": "dkd"}
