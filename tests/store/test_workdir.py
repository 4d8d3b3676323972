"""The directory of a run is checked, locked and recorded; other runs are refused."""

import errno
import json
import logging
import os
import subprocess

import processes
import pytest

from lakd_jax import errors
from lakd_jax.store import bucket, locks, workdir

CONFIG = {
    "seed": 0,
    "model": {"name": "resnet20", "widths": (16, 32)},
    "optim": {"lr": 0.1, "decay": None},
    "empty": {},
}


def _fail(number):
    """Returns a function that fails with this error of the system."""

    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail


def _refusal(folder, config, **options):
    """Returns the lines of the error with which `config` is refused."""
    with pytest.raises(errors.WorkdirError) as caught:
        workdir.prepare(folder, config, **options)
    return str(caught.value).splitlines()


def test_first_use_records_config_and_environment(place):
    """Promise 22: versions, commit, devices and command, before step 1."""
    with workdir.prepare(place / "a" / "run", CONFIG) as run:
        assert not run.resumed
        assert run.path == place / "a" / "run"
        text = (run.path / "config.json").read_text()
        assert json.loads(text) == json.loads(json.dumps(CONFIG))
        assert text.index('"empty"') < text.index('"model"') < text.index('"seed"')
        found = workdir.read_json(run.path / "environment.json")
        names = {p.name for p in run.path.iterdir()}
    assert names == {"config.json", "environment.json", ".lock"}
    needed = {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert found["versions"].keys() == needed | {"lakd_jax"}
    assert len(found["devices"]) == 8
    assert "python" in found["command"]
    assert found["started"].endswith("+00:00")
    assert "commit" in found


def test_same_config_resumes_and_keeps_the_first_environment(place):
    """Promise 8: without any flag."""
    workdir.prepare(place, CONFIG).close()
    before = (place / "environment.json").read_text()
    with workdir.prepare(place, CONFIG) as run:
        assert run.resumed
    assert (place / "environment.json").read_text() == before


def test_other_config_is_refused_field_by_field(place):
    """Promises 4, 8: with the old and the new value of each field."""
    workdir.prepare(place, CONFIG).close()
    other = {"seed": 1, "optim": {"lr": 0.1, "momentum": 0.9}, "empty": {"x": 1}}
    lines = _refusal(place, CONFIG | other)
    assert "5 fields differ" in lines[0] and str(place) in lines[0]
    assert lines[1:-1] == [
        "  empty: {} -> absent",
        "  empty.x: absent -> 1",
        "  optim.decay: null -> absent",
        "  optim.momentum: absent -> 0.9",
        "  seed: 0 -> 1",
    ]
    assert "--workdir" in lines[-1] and "old values" in lines[-1]
    assert workdir.read_json(place / "config.json")["seed"] == 0
    # The refused attempt released the lock.
    workdir.prepare(place, CONFIG).close()


def test_many_differences_are_cut(tmp_path):
    workdir.prepare(tmp_path, {f"f{i:02}": i for i in range(20)}).close()
    lines = _refusal(tmp_path, {f"f{i:02}": "x" * 500 for i in range(20)})
    assert "20 fields differ (first 8 shown)" in lines[0]
    assert len(lines) == 10
    assert max(map(len, lines[1:])) < 100


def test_fields_that_may_change_are_taken_over(place):
    old = CONFIG | {"clip": float("nan")}
    workdir.prepare(place, old).close()
    new = old | {"optim": {"lr": 0.2, "decay": None}}
    lines = _refusal(place, new, may_change=["seed"])
    assert lines[1] == "  optim.lr: 0.1 -> 0.2"
    workdir.prepare(place, new, may_change=["optim.lr"]).close()
    assert workdir.read_json(place / "config.json")["optim"]["lr"] == 0.2


def test_a_run_of_another_version_is_refused(place, monkeypatch):
    """Promise 7: in one line, with both versions, and nothing is changed."""
    workdir.prepare(place, CONFIG).close()
    before = (place / workdir.CONFIG).read_bytes()
    monkeypatch.setattr(workdir.version, "VERSION", "9.9.9")
    (line,) = _refusal(place, CONFIG | {"new": 1})
    assert "was started by lakd_jax 0." in line and "this is 9.9.9" in line
    assert "another --workdir" in line
    assert (place / workdir.CONFIG).read_bytes() == before


def test_other_versions_on_resume_are_a_warning(tmp_path, caplog):
    workdir.prepare(tmp_path, CONFIG).close()
    file = tmp_path / "environment.json"
    file.write_text(file.read_text().replace('"jaxlib": "', '"jaxlib": "9'))
    workdir.prepare(tmp_path, CONFIG).close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "versions.jaxlib: " in record.getMessage()
    file.unlink()
    workdir.prepare(tmp_path, CONFIG).close()
    assert file.exists()


def test_checkpoints_without_config_and_garbled_config_are_refused(place):
    bucket.make_folder(place / "checkpoints")
    workdir.write_bytes(place / "checkpoints" / "1", b"")
    (line,) = _refusal(place, CONFIG)
    assert "no config.json" in line
    (place / "config.json").write_text("{")
    (line,) = _refusal(place, CONFIG)
    assert "config.json: not readable" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk_is_found_at_the_start(tmp_path, monkeypatch, number):
    """Promise 34: by writing a megabyte."""

    monkeypatch.setattr(os, "fsync", _fail(number))
    first, _ = _refusal(tmp_path, CONFIG)
    assert os.strerror(number) in first and str(tmp_path) in first
    assert errors.WorkdirError.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_failure_while_recording_frees_the_lock(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _fail(errno.ENOSPC))
        assert "No space" in _refusal(tmp_path, CONFIG)[0]
    assert not workdir.prepare(tmp_path, CONFIG).resumed


def test_path_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{path}: cannot be written" in _refusal(path, CONFIG)[0]


_HOLDER = """
import sys, time
from lakd_jax.store import workdir
run = workdir.prepare(sys.argv[1], {})
print("held", flush=True)
time.sleep(60)
"""


def test_folder_in_use_is_refused_until_the_other_process_dies(place):
    process = processes.start("-c", _HOLDER, place)
    try:
        assert process.stdout.readline() == "held\n"
        first, _ = _refusal(place, {})
        assert f"in use by process {process.pid} on " in first
    finally:
        process.kill()
        process.communicate()
    run = workdir.prepare(place, {})
    assert f"process {os.getpid()}" in _refusal(place, {})[0]
    run.close()
    run.close()
    workdir.prepare(place, {}).close()


def test_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks.fcntl, "flock", _fail(errno.ENOTSUP))
    workdir.prepare(tmp_path, CONFIG).close()
    assert "no locks" in caplog.text


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    workdir.write_json(file, {"top1": 0.9, "a": [1, "é"]})
    assert workdir.read_json(file) == {"top1": 0.9, "a": [1, "é"]}
    with pytest.raises(TypeError):
        workdir.write_json(file, {"top1": object()})
    monkeypatch.setattr(os, "fsync", _fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        workdir.write_json(file, {})
    assert workdir.read_json(file)["top1"] == 0.9


def test_commit_is_of_the_checkout_that_has_the_code(tmp_path, monkeypatch):
    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True)

    source = tmp_path / "workdir.py"
    source.write_text("")
    monkeypatch.setattr(workdir, "__file__", str(source))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert workdir.environment()["commit"] is None  # another project's checkout
    git("add", "workdir.py")
    git("commit", "-q", "-m", "y")
    commit = workdir.environment()["commit"]
    assert len(commit) == 40
    source.write_text("changed")
    assert workdir.environment()["commit"] == f"{commit}-dirty"
