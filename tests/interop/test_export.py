"""Exports the student of a finished run and loads it without this package."""

import errno
import json
import os
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet_weights
import tiny
import torch_resnet

from lakd_jax import config as config_lib
from lakd_jax import export, interop, models
from lakd_jax.data import preparation
from lakd_jax.interop import weights as weights_lib
from lakd_jax.store import workdir
from lakd_jax.training import spec as spec_lib

# ml_collections loads config files in a way deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

assert_refused = commands.assert_refused
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)
RESULT = {
    "method": "kd",
    "student": "resnet8",
    "teacher": "resnet20",
    "classes": 3,
    "class_names": ["dark", "left", "right"],
    "image_shape": [8, 8, 3],
    "data": "0123456789abcdef",
    "seed": 7,
    "epochs": 4,
    "test_last": {"right": 40, "examples": 45, "accuracy": 40 / 45, "loss": 0.2},
    "test_best_on_minival": None,
    "teacher_test": {"right": 44, "examples": 45, "accuracy": 44 / 45, "loss": 0.1},
    "parameters": 77587,
}


@pytest.fixture
def finished(tmp_path):
    """Returns the directory of a finished run, with random weights."""
    run = tmp_path / "run"
    run.mkdir()
    write_run(run, RESULT)
    return run


def write_run(run, result, **fields):
    config = tiny.config(run, seed=7, method="kd", **fields)
    model = models.create("resnet8", num_classes=3)
    size = config.student.image_size or result.get("image_shape", [0])[0]
    shape = result.get("image_shape")
    steps = preparation.Preparation(*shape[:2]) if shape else None
    network = weights_lib.Loaded(model, None, "", MEAN, STD, size, steps)
    weights = variables()
    weights_lib.save(run / workdir.STUDENT, weights, network, result)
    workdir.write_json(run / workdir.RESULT, result)
    workdir.write_json(run / workdir.CONFIG, config_lib.to_dict(config))
    workdir.write_json(run / workdir.ENVIRONMENT, workdir.environment())


def variables():
    return tiny.variables(models.create("resnet8", num_classes=3))


def images(count):
    return tiny.split(5, 3).images[:count]


def logits(count, dtype=jnp.float32, size=0):
    """Returns the network's logits of `images(count)`."""
    model = models.create("resnet8", num_classes=3, dtype=dtype)
    pixels = spec_lib.Pixels(MEAN, STD, jnp.dtype(dtype), size)
    inputs = pixels(jnp.asarray(images(count)))
    return np.asarray(model.apply(variables(), inputs, train=False).logits)


def test_safetensors(finished, capsys):
    path = export.run(finished, "safetensors")
    assert path == finished / "export" / "resnet8.safetensors"
    out = capsys.readouterr().out
    assert str(path) in out and "resnet8.md" in out
    expected = interop.to_torch("resnet8", variables())
    resnet_weights.assert_same_tree(interop.load_torch_file(path), expected)
    # It can be loaded as a teacher.
    options = {"dtype": "float32", "num_classes": 3}
    loaded = weights_lib.load("teacher", "resnet8", str(path), **options)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables())


@pytest.mark.parametrize("to", ["torch", "safetensors"])
def test_pytorch_takes_it_strictly_and_agrees(finished, to):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    path = export.run(finished, to)
    read = safetensors.torch.load_file if to == "safetensors" else torch.load
    state = read(path)
    module = torch_resnet.resnet8(torch, classes=3)
    assert state.keys() == module.state_dict().keys()
    module.load_state_dict(state, strict=True)
    unit = images(5).transpose(0, 3, 1, 2) / 255
    normal = (unit - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        theirs = module.eval()(torch.from_numpy(normal.astype(np.float32))).numpy()
    np.testing.assert_allclose(theirs, logits(5), rtol=1e-4, atol=1e-4)


LOAD = """
import sys
import numpy as np
import jax.export

with open(sys.argv[1], "rb") as file:
    network = jax.export.deserialize(bytearray(file.read()))
answers = {}
for count in (1, 5):
    answers[str(count)] = np.asarray(network.call(np.load(sys.argv[2])[:count]))
np.savez(sys.argv[3], **answers)
assert not [name for name in sys.modules if name.startswith(("lakd_jax", "flax"))]
print(network.platforms)
"""


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float32", 0),
        pytest.param("bfloat16", 0, marks=pytest.mark.long),
        pytest.param("float32", 12, marks=pytest.mark.long),
    ],
)
def test_stablehlo_in_a_process_with_jax_alone(finished, tmp_path, dtype, size):
    write_run(finished, RESULT, dtype=dtype, student__image_size=size)
    path = export.run(finished, "stablehlo")
    assert path.name == "resnet8.stablehlo"
    np.save(tmp_path / "images.npy", images(5))
    files = [path, tmp_path / "images.npy", tmp_path / "answers.npz"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, files)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"'{platform}'" in done.stdout for platform in ("cpu", "cuda", "tpu"))
    answers = np.load(files[2])
    close = 1e-5 if dtype == "float32" else 0.05
    for count in (1, 5):
        answer = answers[str(count)]
        assert answer.dtype == np.float32 and answer.shape == (count, 3)
        expected = logits(count, dtype, size)
        np.testing.assert_allclose(answer, expected, rtol=close, atol=close)
    text = path.with_suffix(".md").read_text()
    assert ("resize to 12x12" in text) == (size == 12)


def test_stablehlo_takes_only_what_it_was_made_for(finished):
    path = export.run(finished, "stablehlo")
    network = jax.export.deserialize(bytearray(path.read_bytes()))
    for wrong in (images(2).astype(np.float32), images(2)[:, :4]):
        with pytest.raises(ValueError):
            network.call(wrong)


def test_the_card_tells_what_is_needed(finished):
    text = export.run(finished, "safetensors").with_suffix(".md").read_text()
    for words in (
        "# resnet8",
        "| parameters | 77,587 |",
        "88.89 % (40 of 45 images right) after the last epoch",
        "| teacher | resnet20, 97.78 %",
        "| method | kd |",
        "| epochs | 4 |",
        "| seed | 7 |",
        f"jax {jax.__version__}",
        "8 pixels high and 8 wide",
        "mean = (0.4, 0.5, 0.6)",
        "std = (0.3, 0.2, 0.25)",
        '["dark", "left", "right"]',
        "## resnet8.safetensors",
        "| optim.warmup_epochs | `1.0` |",
    ):
        assert words in text, words
    for absent in ("resnet8.pth", "resnet8.stablehlo", "optim.lr", "kd.temperature"):
        assert absent not in text, absent
    text = export.run(finished, "stablehlo").with_suffix(".md").read_text()
    assert "## resnet8.safetensors" in text and "## resnet8.stablehlo" in text
    assert "teacher.image_size" not in text
    write_run(finished, RESULT, student__image_size=12)
    text = export.run(finished, "safetensors").with_suffix(".md").read_text()
    assert (
        '--config.teacher.std="(0.3, 0.2, 0.25)" --config.teacher.image_size=12' in text
    )


def test_the_card_of_a_run_that_recorded_less(finished):
    less = {k: v for k, v in RESULT.items() if k not in ("class_names", "image_shape")}
    write_run(finished, less | {"teacher": None, "teacher_test": None})
    (finished / workdir.ENVIRONMENT).unlink()
    text = export.run(finished, "safetensors").with_suffix(".md").read_text()
    assert "a size that was not recorded" in text
    assert "| versions | not recorded |" in text
    assert "## Classes" not in text and "| teacher |" not in text


# ------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("file", "content", "to", "words"),
    [
        (workdir.CONFIG, None, "torch", "is not a run (it has no config.json)"),
        (workdir.CONFIG, b"{", "torch", "config.json: not readable"),
        (workdir.RESULT, None, "stablehlo", "has no result.json); finish it"),
        (workdir.STUDENT, b"{}", "torch", "not a readable safetensors file"),
        ("export", b"mine", "torch", "export: cannot be written: File exists"),
    ],
)
def test_what_cannot_be_exported(main, finished, file, content, to, words):
    if content is None:
        (finished / file).unlink()
    else:
        (finished / file).write_bytes(content)
    assert_refused(main("--mode=export", f"--workdir={finished}", f"--to={to}"), words)
    assert not (finished / "export").is_dir()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("resnet14", "is not a student of a run: the variables are not those of"),
        ("resnet9", "did you mean 'resnet8'"),
    ],
)
def test_students_that_are_not_of_their_network(main, finished, network, words):
    path = finished / workdir.STUDENT
    weights, card = interop.load_variables(path)
    interop.save_variables(path, weights, card | {"network": network})
    assert_refused(main("--mode=export", f"--workdir={finished}", "--to=torch"), words)
    assert not (finished / "export").is_dir()


def test_full_disk(main, finished, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    result = main("--mode=export", f"--workdir={finished}", "--to=safetensors")
    assert_refused(
        result, f"{finished}/export: cannot be written: No space left on device"
    )
    assert not (finished / "export" / "resnet8.safetensors").exists()


# ------------------------------------------------------------------- the flags


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mode=exprot"], ["--mode is 'exprot'; did you mean 'export'?"]),
        (["--mode=export"], ["--workdir is missing", "--to is missing"]),
        (["--mode=export", "--to=torch"], ["--workdir is missing"]),
        (["--mode=export", "--workdir=a"], ["--to is missing"]),
        (["--mode=export", "--workdir=a", "--to=torch"], ["a: is not a run (it has"]),
        (
            ["--mode=export", "--workdir=a", "--to=safetensor"],
            ["--to is 'safetensor'; did you mean 'safetensors'?"],
        ),
        (
            ["--mode=export", "--workdir=a", "--to=torch", commands.DIGITS]
            + ["--dry_run", "--config.epochs=3"],
            ["--config has no effect with --mode=export", "--dry_run", "config.epochs"],
        ),
        (["--mode=networks", "--to=torch"], ["--to has no effect"]),
        ([commands.DIGITS, "--to=torch"], ["--to has no effect with --mode=train"]),
        (["--mode=train"], ["--config is missing"]),
    ],
)
def test_flags_and_modes(main, args, words):
    assert_refused(main(*args), *words)


def test_export_from_the_command_line(main, finished):
    args = ("--mode=export", f"--workdir={finished}", "--to=safetensors")
    code, out, err = main(*args)
    assert (code, err) == (0, "")
    assert out.startswith(f"{finished}/export/resnet8.safetensors (3")
    assert out.endswith(" bytes), described in resnet8.md\n")
    assert json.loads((finished / "result.json").read_text()) == RESULT
