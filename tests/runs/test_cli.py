"""The command line: exit codes, error lines, and a whole run."""

import errno
import json
import os
import signal
import subprocess
import sys

import commands
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from PIL import Image

from lakd_jax import cli, errors, interop, models
from lakd_jax.runs import command, single
from lakd_jax.store import workdir
from lakd_jax.training import loop

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DIGITS = commands.DIGITS
assert_refused, untouched = commands.assert_refused, commands.untouched
CONFIG = """
import pathlib
import tiny

def get_config(directory):
    fields = {"method": "kd", "baselines": ("none",), "epochs": 2}
    return tiny.small(pathlib.Path(directory), **fields)
"""


@pytest.fixture
def tiny_main(main, tmp_path):
    """`main` on the tiny data set and one device, with --config set."""
    file = tmp_path / "tiny_config.py"
    file.write_text(CONFIG)
    with tiny.environment():
        yield lambda *args: main(f"--config={file}:{tmp_path}", *args)


# ------------------------------------------------------------------ the process


def process(*args, options=(), **environment):
    """Returns (exit code, stdout, stderr) of `python OPTIONS main.py ARGS`."""
    done = subprocess.run(
        [sys.executable, *options, commands.ROOT / "main.py", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_does_not_import_jax():
    code, out, err = process("--help", options=("-X", "importtime"))
    assert code == 0
    assert "--config=configs/digits_lakd.py" in out and "--dry_run" in out
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert "lakd_jax.cli" in imported and "jax" not in imported


def test_configuration_faults_are_all_reported_at_once():
    """Promise 20: all at once, without a traceback or a compilation."""
    wrong = {"optim.lrr": 0.1, "epochs": "ten", "student.name": "resnet21"}
    flags = [f"--config.{field}={value}" for field, value in wrong.items()]
    result = process(DIGITS, *flags, "--config.batch_size=0", JAX_LOG_COMPILES="1")
    words = ("did you mean optim.lr?", "epochs must be int, is 'ten'")
    words += ("student.name is 'resnet21'", "batch_size must be")
    assert assert_refused(result, *words).count("\n") == 4


# -------------------------------------------------------------------- the flags


def test_without_arguments_the_usage_is_shown(main):
    code, out, _ = main()
    assert (code, out) == (2, cli.USAGE + "\n")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dry_run"], ["--config is missing"]),
        (["--config"], ["Missing value for flag --config"]),
        (["--config=nowhere.py"], ["nowhere.py: [Errno 2] No such file"]),
        (["--config", "nowhere.py"], ["nowhere.py: [Errno 2] No such file"]),
        ([DIGITS, "--dryrun"], ["'dryrun'", "dry_run"]),
        ([DIGITS, "stray"], ["'stray' is not understood"]),
        ([DIGITS, "--config.optim=3"], ["optim is not a field"]),
        ([DIGITS, "--config.seed=1.5"], ["seed must be int, is '1.5'"]),
        ([DIGITS, "--config.seed", "1.5"], ["seed must be int, is '1.5'"]),
        ([DIGITS, "--config.data.pad="], ["data.pad must be int, is ''"]),
        ([DIGITS, "--config.epochs"], ["--config.epochs has no value"]),
        (
            [DIGITS, "--config.teachers=runs/a,resnet20=b"],
            ["write --config.teachers=\"('runs/a', 'resnet20=b')\""],
        ),
        ([DIGITS, "--config.data.flip=si"], ["data.flip must be bool, is 'si'"]),
        ([DIGITS, "--config.data.source="], ["data.source='' names no data"]),
        ([DIGITS, "--config.batch_size=12"], ["batch_size is 12, which 8 devices"]),
    ],
)
def test_fault_in_the_flags(main, args, words, tmp_path):
    assert_refused(main(f"--workdir={tmp_path / 'run'}", *args), *words)
    assert untouched(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nonsense", ["No module named 'nonsense'"]),
        ("x = (", ["SyntaxError", "line 1"]),
        ("def get_config(): return 3", ["get_config() gave int"]),
        ("def get_config(): raise ValueError('too bad')", ["ValueError: too bad"]),
        (
            "from lakd_jax import config\n"
            "def get_config():\n"
            "  c = config.default()\n"
            "  c.lr, c.optim.momentum = 1, 2.0\n"
            "  del c.epochs\n"
            "  return c",
            ["lr is not a field", "epochs is missing", "optim.momentum must be from"],
        ),
    ],
)
def test_fault_in_the_config_file(main, text, words, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(text)
    assert_refused(main(f"--config={file}", f"--workdir={tmp_path / 'run'}"), *words)


def test_long_errors_are_cut_to_ten_lines(main, tmp_path):
    """Promise 20: the last line has the number of lines left out."""
    wrong = [f"--config.kd.field{i}=1" for i in range(20)]
    err = assert_refused(main(DIGITS, *wrong))
    assert err.splitlines()[-1] == "... and 11 more"
    assert cli.ten_lines("a\n" * 10) == "a\n" * 10


# ------------------------------------------------------------------ the teacher


def student_file(directory, name="resnet8", classes=3):
    return tiny.save_student(directory, models.create(name, num_classes=classes), name)


def no_file(path):
    return path, [f"teacher.init: {path} does not exist"]


def no_run(path):
    path.mkdir()
    return path, ["is not a finished run (it has no result.json)"]


def no_student(path):
    (student_file(path) / workdir.STUDENT).unlink()
    return path, ["teacher.init: ", "no weights at", workdir.STUDENT]


def no_card(path):
    interop.save_variables(f"{path}.safetensors", {"params": {"a": np.ones(2)}}, {})
    return f"{path}.safetensors", [
        "teacher.init: ",
        "is not a student of a run",
        "num_classes",
    ]


def other_network(path):
    return student_file(path, "resnet14"), ["holds a resnet14, not the resnet8"]


def other_classes(path):
    words = ["has 10 classes, the data has 3"]
    return student_file(path, classes=10), words


def other_keys(path):
    path = path.with_suffix(".safetensors")
    weights = {"fc.weight": np.ones((3, 64), "f4"), "fc.bias": np.ones(3, "f4")}
    weights["extra.weight"] = np.ones((1, 1, 1, 1), "f4")
    safetensors.numpy.save_file(weights, path, metadata={"format": "pt"})
    words = ["do not fit resnet8", " missing: ", "layer1.0", "1 surplus: extra"]
    return path, words


def cut_short(path):
    file = student_file(path) / workdir.STUDENT
    file.write_bytes(file.read_bytes()[:5000])
    return path, ["not a readable safetensors file"]


def no_better_than_chance(path):
    words = ["teacher.init: ", "of 45 test images right", "the 66.67 % required"]
    words += [str(path), "mean (0.4, 0.4, 0.4)", "deviation (0.3, 0.3, 0.3)"]
    return student_file(path), words


TEACHERS = [no_file, no_run, no_student, no_card, other_network, other_classes]
TEACHERS += [other_keys, cut_short, no_better_than_chance]


@pytest.mark.parametrize("fault", TEACHERS)
def test_fault_in_the_teacher(tiny_main, fault, tmp_path):
    """Promises 15, 17, 21: missing, truncated, incompatible, or too inaccurate."""
    init, words = fault(tmp_path / "other")
    run = tmp_path / "run"
    args = (f"--config.teacher.init={init}", "--config.teacher.floor=0")
    args += ("--config.teacher.name=resnet8",)
    assert_refused(tiny_main(*args, f"--workdir={run}"), *words)
    assert untouched(run)


# ------------------------------------------------------------------- the images


def test_fault_in_the_images(main, tmp_path):
    images, run = tmp_path / "images", tmp_path / "run"
    for k, path in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        (images / path).mkdir(parents=True)
        Image.new("L", (8, 8), 60 * k).save(images / path / "0.png")
    args = (f"--config.data.source=folder:{images}", "--config.data.image_size=0")
    args = (DIGITS, *args, "--config.data.minival=0", f"--workdir={run}")
    assert_refused(main(*args), "2 training images do not fill one batch")
    (images / "test" / "dog" / "0.png").write_bytes(b"\x89PNG but no more")
    assert_refused(main(*args), str(images / "test/dog/0.png"), "not a readable image")
    assert untouched(run)


# ------------------------------------------------------------------ the workdir


def test_disk_that_fills_up_later(tiny_main, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(loop.Fit, "run", fail)
    args = ("--config.method=none", "--config.baselines=()")
    result = tiny_main(*args, f"--workdir={tmp_path / 'run'}")
    assert_refused(result, "No space left on device", str(tmp_path))


# -------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DataError, 2),
        (errors.WorkdirError, 2),
        (errors.NoCheckpointError, 3),
        (errors.NonFiniteError, 4),
        (errors.CheckpointWriteError, 5),
    ],
)
def test_exit_code_of_an_error(main, monkeypatch, error, code):
    def fail(*args, **kwargs):
        raise error("what is wrong\nand what to do")

    monkeypatch.setattr(command, "run", fail)
    err = assert_refused(main(DIGITS), code=code)
    assert err == "what is wrong\nand what to do\n"


def test_signals_while_the_data_is_loaded(main, monkeypatch, tmp_path):
    """Promises 9, 11: they end the process at once and leave no files."""
    found = []

    def load(*args, **options):
        found.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT)))
        raise errors.DataError("no data")

    monkeypatch.setattr(single.data, "load", load)
    assert_refused(main(DIGITS, f"--workdir={tmp_path / 'run'}"))
    assert found == [signal.SIG_DFL, signal.SIG_DFL]
    assert untouched(tmp_path / "run")


# ------------------------------------------------------------------- whole runs


def test_dry_run_tells_the_costs_and_writes_nothing(tiny_main, tmp_path, monkeypatch):
    """Promise 23: a step, an evaluation batch, and what they cost."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = tiny_main("--dry_run", f"--workdir={tmp_path / 'run'}")
    assert code == 0, err
    assert "teacher small: random weights stand in" in out
    for word in ("small, 993 parameters", "FLOP", "MiB", "8 = 2 epochs x 4"):
        assert word in out
    assert "of 16 test images right" in out
    after = [p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts]
    assert sorted(after) == before


FILES = ["config.json", "environment.json", "metrics.jsonl", "result.json"]
FILES += ["student.safetensors"]


def test_whole_run(main, tiny_main, tmp_path, monkeypatch):
    """Promise 8: the same command again resumes; another config is refused."""
    run, args = tmp_path / "run", (f"--workdir={tmp_path / 'run'}",)
    # A failed start with a mistyped path leaves the directory usable.
    assert_refused(tiny_main(*args, "--config.teacher.init=mistyped"), "does not exist")
    code, out, err = tiny_main(*args)
    assert code == 0, err
    table = out[out.index("| network") : out.index("\n\nPictures")]
    titles = [line.split("|")[1].strip() for line in table.splitlines()[2:5]]
    names = ("teacher", "alone", "KD")
    assert titles == [f"{tiny.NETWORK}, {name}" for name in names]
    assert (run / "table.md").read_text() == table + "\n"
    for directory in (run, run / "none"):
        for name in FILES:
            assert (directory / name).stat().st_size, (directory, name)
        assert any((directory / "checkpoints").iterdir())
    for name in ("curves.png", "attention.png"):
        assert Image.open(run / name).size[0] > 100
    assert json.loads((run / "config.json").read_text())["epochs"] == 2

    # Repeating the command prints the same and trains nothing.
    with monkeypatch.context() as m:
        m.setattr(loop.Fit, "run", None)
        code, again, _ = tiny_main(*args)
    assert code == 0 and table in again

    # Another config is refused, with the fields that differ.
    other = ("--config.optim.lr=0.07", "--config.kd.temperature=2")
    words = ("optim.lr: 0.05 -> 0.07", "kd.temperature: 4.0 -> 2.0")
    words = (f"{run}: has another config, 2 fields", *words)
    assert_refused(tiny_main(*args, *other), *words)

    # Its student can be exported, with what the run recorded about the images.
    code, out, err = main("--mode=export", f"--workdir={run}", "--to=safetensors")
    assert code == 0, err
    exported = interop.load_torch_file(run / "export" / "small.safetensors")
    kept, _ = interop.load_variables(run / workdir.STUDENT)
    jax.tree.map(
        np.testing.assert_array_equal, interop.from_torch(tiny.NETWORK, exported), kept
    )
    card = (run / "export" / "small.md").read_text()
    assert '["dark", "left", "right"]' in card and "8 pixels high and 8 wide" in card

    # A finished run serves as a teacher and as initial weights of another.
    more = ("--config.baselines=()", "--config.epochs=1")
    inits = (f"--config.student.init={run / 'none'}", f"--config.teacher.init={run}")
    started = (*more, f"--workdir={tmp_path / 'b'}", *inits)
    code, out, err = tiny_main(*started, "--config.optim.lr=1e-9")
    assert code == 0, err
    assert f"teacher small from {run / 'student.safetensors'}" in out
    first, last = (
        interop.load_variables(d / workdir.STUDENT)[0]["params"]
        for d in (run / "none", tmp_path / "b")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, last)
    wrong = f"--config.student.init={tmp_path / 'none'}"
    result = tiny_main(*more, f"--workdir={tmp_path / 'c'}", wrong, inits[1])
    assert_refused(result, "student.init: ", "does not exist")
    assert untouched(tmp_path / "c")
