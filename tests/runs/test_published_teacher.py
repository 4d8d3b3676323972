"""A teacher and a student whose weights are given by name."""

import hashlib
import pathlib

import audit
import pytest
import tiny
import web

from lakd_jax import cli, errors, interop
from lakd_jax.config import resolved
from lakd_jax.interop import downloads, published
from lakd_jax.runs import single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import hosts, interrupt
from lakd_jax.store import workdir

NAME = "torchvision:small.TEST"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model = tiny.SMALL(num_classes=len(tiny.CLASSES))
    with tiny.environment():
        state = interop.to_torch(tiny.NETWORK, tiny.variables(model))
    interop.save_torch_file(file, state)
    return file.read_bytes()


@pytest.fixture
def site(content, monkeypatch):
    """NAME is listed and served; its classes are in another order than the data's."""
    digest = hashlib.sha256(content).hexdigest()
    path = f"/models/small-{digest[:8]}.pth"
    entry = published.Published(
        NAME,
        tiny.NETWORK,
        f"https://publisher.invalid{path}",
        digest[:8],
        (0.4,) * 3,
        (0.3,) * 3,
        8,
        accuracy=0.9,
        data="tiny",
        classes=tiny.CLASSES[::-1],
    )
    monkeypatch.setitem(published.TABLE, NAME, entry)
    with web.Server({path: content}) as server, tiny.environment():
        monkeypatch.setenv(downloads.BASE, server.address)
        yield server


def started(tmp_path, folder=pathlib.Path(), **fields):
    """Returns (config, environment, lines)."""
    given = {"method": "kd", "teacher__floor": 1e-3, "teacher__fold": False}
    config = resolved.resolve(tiny.small(tmp_path, **(given | fields)))
    lines = []
    return (
        config,
        single.environment(config, interrupt.Guard(), lines.append, folder),
        lines,
    )


def test_a_teacher_by_name_is_fetched_tested_and_recorded(site, tmp_path):
    """And found again for a report, without a connection."""
    config, environment, lines = started(tmp_path, teacher__init=NAME)
    teacher = teacher_lib.make(config, environment)
    (path,) = (tmp_path / "teachers/downloads").iterdir()
    assert teacher.pixels.mean == (0.4,) * 3 and teacher.pixels.size == 8
    assert lines[0].startswith(f"teacher.init: fetching {site.address}")
    assert "order of the data's" in "\n".join(lines)
    assert lines[-1].endswith("; published: 90.00 % on tiny")
    teacher_lib.require_same(tmp_path, teacher)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert workdir.read_json(tmp_path / workdir.TEACHER) == {
        "weights": teacher.digest,
        "source": str(path),
        "name": NAME,
        "address": published.TABLE[NAME].address,
        "sha256": digest,
    }
    workdir.write_json(tmp_path / workdir.RESULT, {"teacher_test": None})
    with audit.without(*audit.NETWORK):
        again = teacher_lib.load_recorded(tmp_path, config, environment)
    assert (again.digest, again.pixels) == (teacher.digest, teacher.pixels)
    path.unlink()
    with pytest.raises(errors.TeacherError, match="does not exist; restore it"):
        teacher_lib.load_recorded(tmp_path, config, environment)


def test_a_student_by_name_starts_from_the_same_cache(site, tmp_path, monkeypatch):
    """A relative cache is in the run's folder; one process fetches at a time."""
    turns = []
    in_turn = hosts.in_turn
    monkeypatch.setattr(hosts, "in_turn", lambda f: turns.append(f) or in_turn(f))
    fields = {"student__init": NAME, "teacher__cache": "cache"}
    config, environment, _ = started(tmp_path, tmp_path, **fields)
    turns.clear()
    student = single.load_network("student", config, environment)
    assert len(turns) == 1 and student.origin.name == NAME
    assert pathlib.Path(student.source).parent == tmp_path / "cache/downloads"
    assert student.classes == tiny.CLASSES


def test_a_teacher_that_cannot_be_fetched_is_an_error(site, tmp_path):
    site.files.clear()
    config, environment, _ = started(tmp_path, teacher__init=NAME)
    with pytest.raises(
        errors.TeacherError, match="^teacher.init: .* cannot be fetched"
    ):
        teacher_lib.make(config, environment)


def test_the_mode_lists_every_name(main):
    code, out, err = main("--mode=teachers")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines() if ":" in line[:12]]
    assert set(published.TABLE) <= set(names)
    code, _, err = main("--mode=teachers", "--dry_run")
    assert code == 2 and "--dry_run has no effect with --mode=teachers" in err
    assert "teachers" in cli.USAGE
