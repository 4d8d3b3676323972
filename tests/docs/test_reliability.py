"""The page docs/reliability.md is kept to, and promises that no other file tests."""

import ast
import dataclasses
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from PIL import Image

from lakd_jax import config as config_lib
from lakd_jax import data, errors, interop
from lakd_jax.data import device, distortion, order
from lakd_jax.distill import dkd, kd
from lakd_jax.hme import losses
from lakd_jax.interop import weights as weights_lib
from lakd_jax.report import metrics
from lakd_jax.runs import command, single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import hosts
from lakd_jax.store import checkpoint, manifest, workdir
from lakd_jax.training import phase, segments, setup
from lakd_jax.training import spec as spec_lib

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"

# ------------------------------------------------------------------------- the page


def rows():
    """{number: its cells} of the page's table."""
    lines = re.findall(r"^\| (\d+) \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    numbers = [int(number) for number, _ in lines]
    assert numbers == list(range(1, 35))
    return {int(n): [c.strip() for c in rest.split(" | ")] for n, rest in lines}


def file_of(name):
    """The path of a test file; their names are unique."""
    (path,) = (ROOT / "tests").rglob(f"{name}.py")
    return path


def docstrings(path):
    """{test: its docstring} of a file."""
    found = ast.parse(path.read_text()).body
    functions = [f for f in found if isinstance(f, ast.FunctionDef)]
    tests = [f for f in functions if f.name.startswith("test_")]
    return {f.name: ast.get_docstring(f) or "" for f in tests}


def promised(text):
    """The numbers that a docstring names: "Promise 3: ..." or "Promises 3, 4: ..."."""
    found = re.search(r"Promises? ((?:\d+(?:, )?)+):", text)
    return {int(n) for n in found[1].split(", ")} if found else set()


@pytest.mark.parametrize("number", range(1, 35))
def test_the_page_names_a_test_of_every_promise(number):
    """A test that the page names is there, and says itself which promise it tests."""
    promise, tests, figure = rows()[number]
    assert promise and figure
    named = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
    assert named or tests.startswith("not promised: ")
    for file, function in named:
        found = docstrings(file_of(file))
        assert function in found, f"{file} has no {function}"
        assert number in promised(found[function]), f"{function} does not name it"


def test_every_test_that_names_a_promise_is_on_the_page():
    table = rows()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for function, text in docstrings(path).items():
            for number in promised(text):
                assert f"`{path.stem}::{function}`" in table[number][1]


def test_security_page_names_tests_that_are_there():
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+)::(test_\w+)`", text)
    assert len(named) > 10
    for file, function in named:
        assert function in docstrings(file_of(file)), function


# ------------------------------------------------------------ checkpoints, resume


def size_of(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.mark.long
def test_a_run_keeps_few_checkpoints_and_no_teacher(tmp_path):
    """Promises 5, 16: two checkpoints, a note of the teacher, held to it."""
    # The teacher is larger than all that a run of resnet8 may keep.
    teacher = {"teacher__name": "resnet14", "teacher__floor": 0.01}
    config = tiny.config(tmp_path, method="kd", epochs=3, checkpoint__keep=2, **teacher)
    run = tmp_path / "run"

    def train():
        with tiny.environment():
            command.run(config, run, **tiny.quiet())

    train()
    assert len(checkpoint.list_steps(run / "checkpoints")) == 2
    _, arrays, _ = checkpoint.read_arrays(run / "checkpoints", None)
    assert not [name for name in arrays if "teacher" in name]
    weights = "train/params/student/", "train/batch_stats/student/"
    mine = sum(x.nbytes for name, x in arrays.items() if name.startswith(weights))
    assert (run / workdir.STUDENT).stat().st_size < mine + 16_384
    # Parameters, momentum and the best ones, twice; the student, last and best; and
    # small files.
    assert size_of(run) < (2 * 3 + 2) * mine + 300_000
    train()  # the same command tells the result again
    note = workdir.read_json(run / workdir.TEACHER)
    file = pathlib.Path(note["source"])
    variables, card = interop.load_variables(file)
    assert note["weights"] == manifest.digest(variables)
    variables["params"]["head"]["dense"]["bias"][0] += 1e-3
    interop.save_variables(file, variables, card)
    with pytest.raises(errors.TeacherError, match="has other weights"):
        train()


def test_another_teacher_than_at_the_start_is_refused(tmp_path):
    """Promise 16: its weights are known by their content."""

    def teacher(name, digest):
        loaded = weights_lib.Loaded(None, None, name)
        return single.Teacher(loaded, None, None, 1, digest)

    teacher_lib.require_same(tmp_path, teacher("a", "1"))
    teacher_lib.require_same(tmp_path, teacher("moved", "1"))
    with pytest.raises(errors.TeacherError) as caught:
        teacher_lib.require_same(tmp_path, teacher("b", "2"))
    assert "b has other weights (2) than" in str(caught.value)
    assert "was started with (1, from a)" in str(caught.value)


# ------------------------------------------------------------------ faults, numbers


def test_a_faulty_config_reads_no_data_and_compiles_nothing(
    monkeypatch, tmp_path, caplog
):
    """Promise 20: its faults are found before any work."""
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("data was read"))
    config = tiny.config(tmp_path, epochs=0, optim__lr=0.0)
    with jax.log_compiles(), pytest.raises(errors.ConfigError) as caught:
        command.run(config, tmp_path / "run", **tiny.quiet())
    assert len(caught.value.problems) == 2
    assert not caplog.records and not (tmp_path / "run").exists()
    with jax.log_compiles():
        jax.jit(lambda x: x + 1)(1)
    assert "Compiling" in caplog.text  # as it would have been above


def _dkd(student, teacher, alpha, beta):
    labels = jnp.zeros(len(student), jnp.int32)
    return dkd.dkd_loss(student, teacher, labels, alpha, beta, 1.0)


DIVERGENCES = {
    "kd, T = 1": lambda s, t: kd.kd_loss(s, t, 1.0),
    "kd, T = 4": lambda s, t: kd.kd_loss(s, t, 4.0),
    "kd, standardised": lambda *st: kd.kd_loss(*map(kd.standardised, st), 2.0),
    "dkd, of the label": lambda s, t: _dkd(s, t, 1.0, 0.0),
    "dkd, of the others": lambda s, t: _dkd(s, t, 0.0, 1.0),
    "binary": lambda s, t: losses.binary_kd(s, t, 4.0),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("near", [False, True])
def test_divergences_of_bfloat16_logits_are_not_negative(name, near):
    """Promise 24: on 1,000 pairs up to 50, far from each other or nearly equal."""
    keys = jax.random.split(jax.random.key(0))
    shape = (1000, 1, 100)
    teacher = jax.random.uniform(keys[0], shape, minval=-50.0, maxval=50.0)
    drawn = jax.random.uniform(keys[1], shape, minval=-50.0, maxval=50.0)
    student = teacher + 1e-2 * drawn if near else drawn
    pairs = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    values = jax.jit(jax.vmap(DIVERGENCES[name]))(*pairs)
    assert values.dtype == jnp.float32 and values.shape == (1000,)
    assert jnp.all(jnp.isfinite(values)) and jnp.min(values) >= -1e-6
    assert jnp.max(values) > 0


def test_each_use_of_the_seed_follows_it(tmp_path):
    """Promise 13: initial weights, augmentation, dropout and order, each by itself."""

    def drawn(seed):
        first = phase.key(phase.Phase(tiny.config(tmp_path, seed=seed)))
        keys = [first, *device.keys(seed).values()]
        images = order.batch_indices(seed, 0, 50, 8, True)
        return [tuple(x.tolist()) for x in (*map(jax.random.key_data, keys), images)]

    zero, one = drawn(0), drawn(1)
    assert drawn(0) == zero
    assert len({*zero, *one}) == len(zero) + len(one)


# ----------------------------------------------------------------------- the teacher


def test_modules_hand_the_teacher_images_as_it_takes_them():
    """Promise 18: where modules are trained one by one, too."""
    split, rows = tiny.split(4, 0), np.array([2, 0])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    own = spec_lib.Pixels((0.2, 0.3, 0.4), (0.5, 0.6, 0.7), jnp.float32)
    other = dataclasses.replace(own, mean=(0.5,) * 3)
    spec = types.SimpleNamespace(
        student_pixels=other,
        teacher=object(),
        teacher_pixels=own,
        view=lambda step: step,
        pad=0,
        flip=False,
        distortion=distortion.Distortion(),
        mixing=None,
        fills=False,
        mesh=mesh,
    )
    held = device.device_data(split, 0, mesh)
    below, batch = segments.start(spec, jnp.int32(0), held, rows)
    for given, pixels in ((below.student, other), (below.teacher, own)):
        wanted = (split.images[rows] / 255 - pixels.mean) / np.array(pixels.std)
        np.testing.assert_allclose(given, wanted, atol=1e-6)
    assert batch.labels.tolist() == split.labels[rows].tolist()


def test_what_the_teacher_sees_is_asked_of_the_config_its_file_and_the_data(tmp_path):
    """Promise 18: in this order."""
    model = tiny.SMALL(num_classes=3)
    config, bare = tiny.config(tmp_path), weights_lib.Loaded(model, None, "")
    known = dataclasses.replace(bare, mean=(0.1,) * 3, std=(0.9,) * 3, size=12)
    fields = {"teacher.mean": (0.2,) * 3, "teacher.std": (0.8,) * 3}
    given = config_lib.changed(config, fields | {"teacher.image_size": 16})
    seen = {}
    for name, arguments in {
        "data": (config, bare),
        "file": (config, known),
        "config": (given, known),
    }.items():
        pixels = teacher_lib._pixels(*arguments)
        seen[name] = pixels.mean, pixels.std, pixels.size
    assert seen == {
        "data": (tuple(config.data.mean), tuple(config.data.std), 0),
        "file": ((0.1,) * 3, (0.9,) * 3, 12),
        "config": ((0.2,) * 3, (0.8,) * 3, 16),
    }


# ------------------------------------------------------------------------- processes


def test_processes_compare_all_that_must_agree(monkeypatch, tmp_path):
    """Promise 28: config, code, data, weights and the step restored."""
    compared = {}
    monkeypatch.setattr(hosts, "agree", compared.update)
    monkeypatch.setattr(
        hosts, "agree_on_arrays", lambda name, tree: compared.update({name: tree})
    )
    monkeypatch.setattr(data, "load", lambda *a, **k: tiny.dataset())
    config = tiny.config(tmp_path, compile_cache="", teacher__fold=False)
    command._begin(config)
    assert compared.pop("commit of the code") == workdir.code()["commit"]
    versions = workdir.code()["versions"]
    assert compared == config_lib.flat(config) | versions

    compared.clear()
    environment = single.environment(config, **tiny.quiet())
    assert list(compared.values()) == [tiny.dataset().fingerprint()]

    compared.clear()
    model = weights_lib.models.create("resnet8", num_classes=3)
    loaded = weights_lib.Loaded(model, tiny.variables(model), "")
    teacher_lib._frozen(config, loaded, environment)
    assert compared["the teacher"]["params"]

    drawn = {"student": {"w": jnp.ones(3)}}, {}
    plain = types.SimpleNamespace(
        optimizer=optax.identity(), average=None, mesh=environment.mesh
    )
    state = setup.FirstState(plain, lambda: drawn, None, phase.Phase(config))()
    assert compared["the first state"].params.keys() == state.params.keys()

    compared.clear()
    with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
        saver.save(7, {"w": np.zeros(3)}, extra={})
        saver.restore({"w": np.zeros(3)})
    assert compared == {f"step restored from {tmp_path}": 7}


def test_other_processes_write_and_print_nothing(monkeypatch, tmp_path):
    """Promise 30: neither lines nor metrics."""
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    lines = []
    hosts.notifier(lines.append)("a line")
    with metrics.MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, "train", {"loss": 1.0})
    assert not lines and not list(tmp_path.iterdir())


def test_what_stops_the_first_process_is_the_reason_of_all(monkeypatch):
    """Promise 30: they are sent its fault."""
    sent = []
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "_gather", lambda text: [*sent, text, sent.append(text)])

    def work():
        raise errors.DataError("no images")

    with pytest.raises(errors.DataError):
        hosts.first(work)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    with pytest.raises(errors.HostsError, match="process 0 stopped: no images"):
        hosts.first(pytest.fail)


# --------------------------------------------------------------------------- images


@pytest.fixture
def some_broken(tmp_path):
    """Five images of each of two classes; training images 1 and 5 are broken."""
    for role in ("train", "test"):
        for k, name in enumerate(("a", "b")):
            (tmp_path / role / name).mkdir(parents=True)
            for i in range(5):
                image = Image.new("RGB", (8, 8), (10 * k, i, 9 * (role == "test")))
                image.save(tmp_path / role / name / f"{i}.png")
    for name in ("a/1.png", "b/0.png"):
        (tmp_path / "train" / name).write_bytes(b"\x89PNG, no more")
    return tmp_path


def test_undecodable_images_are_left_out_up_to_a_count(some_broken, capsys):
    """Promise 31: they are counted, and the others keep their numbers."""
    found = data.load(f"folder:{some_broken}", max_bad=2)
    assert found.train.ids.tolist() == [0, 2, 3, 4, 6, 7, 8, 9]
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4
    assert found.train.images[:, 0, 0, 1].tolist() == [0, 2, 3, 4, 1, 2, 3, 4]
    assert len(found.test) == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 of 10 images left out (data.max_bad=2)" in line and "a/1.png" in line
    for fewer in (0, 1):
        with pytest.raises(errors.DataError, match=r"\.png: not a readable image"):
            data.load(f"folder:{some_broken}", max_bad=fewer)


def test_the_test_split_is_whole_or_an_error(some_broken):
    """Promise 31: a result that left some out would not be of that data set."""
    (some_broken / "test" / "b" / "3.png").write_bytes(b"")
    with pytest.raises(errors.DataError, match="3.png: not a readable image"):
        data.load(f"folder:{some_broken}", max_bad=10)


def test_no_image_at_all_is_an_error(some_broken):
    """Promise 31: however many may be left out."""
    for file in (some_broken / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(errors.DataError, match="no image can be decoded"):
        data.load(f"folder:{some_broken}", max_bad=100)
