"""Training, loading and using a run from Python."""

import shutil
import subprocess
import sys

import commands
import jax
import numpy as np
import pytest
import tiny

import lakd_jax
from lakd_jax import config as config_lib
from lakd_jax import errors
from lakd_jax.runs import command as command_lib

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def config(folder):
    return tiny.small(folder, epochs=2, method="none")


@pytest.fixture(scope="module")
def run(folder, config, tiny_data):
    return lakd_jax.train(config, folder / "run")


def test_a_run_returns_its_record_and_a_student_that_scores_as_recorded(run):
    test = tiny.split(45, 2)
    right = int(np.sum(run(test.images).argmax(-1) == test.labels))
    assert right == run.result["test_last"]["right"] and right / 45 == run.accuracy
    assert run.predict(test.images[:4]) == [
        tiny.CLASSES[i] for i in run(test.images[:4]).argmax(-1)
    ]
    evaluations = [r for r in run.history if r["kind"] == "eval"]
    assert [r["epoch"] for r in evaluations] == [1, 2]
    assert run.settings["method"] == "none" and run.classes == tiny.CLASSES


def test_results_do_not_depend_on_the_number_of_images(run):
    images = np.concatenate([tiny.split(300, 5).images] * 2)
    logits = run(images)
    assert logits.shape == (600, 3) and logits.dtype == np.float32
    np.testing.assert_allclose(run(images[599:]), logits[599:], rtol=1e-4, atol=1e-5)
    assert run(images[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    "images", [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.float32)]
)
def test_arrays_that_are_not_images_are_refused(run, images):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, H, W"):
        run(images)


def test_a_run_can_be_loaded(run):
    loaded = lakd_jax.load(str(run.directory))
    assert loaded.history == run.history and loaded.result == run.result
    equal = jax.tree.map(np.array_equal, loaded.variables, run.variables)
    assert all(jax.tree.leaves(equal))


def test_training_a_finished_run_again_returns_its_result(run, folder, tmp_path):
    file = tmp_path / "tiny_config.py"
    file.write_text(
        "import pathlib, tiny\n\ndef get_config(arg):\n    return tiny.small("
        "pathlib.Path(arg), epochs=2, method='none')\n"
    )
    began = (run.directory / "metrics.jsonl").stat().st_mtime_ns
    again = lakd_jax.train(f"{file}:{folder}", run.directory)
    assert again.result == run.result
    assert (run.directory / "metrics.jsonl").stat().st_mtime_ns == began


def test_seeds_return_one_run_each(run, config, tmp_path, monkeypatch):
    for seed in (3, 7):
        shutil.copytree(run.directory, tmp_path / f"seed{seed}")
    monkeypatch.setattr(command_lib, "run", lambda config, directory: None)
    several = config_lib.changed(config, {"seeds": (3, 7)})
    found = lakd_jax.train(several, tmp_path)
    assert [run.directory.name for run in found] == ["seed3", "seed7"]


def test_missing_runs_and_configs_are_reported(tmp_path):
    with pytest.raises(errors.ExportError, match="is not a run"):
        lakd_jax.load(tmp_path)
    with pytest.raises(errors.ConfigError, match="missing.py"):
        lakd_jax.train(tmp_path / "missing.py", tmp_path / "run")


def test_importing_is_cheap_and_starts_no_jax():
    code = (
        "import sys, lakd_jax; "
        "import lakd_jax.cli; "  # Windows, which has no fcntl, shows the help
        "assert not {'jax', 'flax', 'orbax', 'fcntl'} & sys.modules.keys(); "
        "c = lakd_jax.config.default(); c.student.name = 'vgg8'; "
        "from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized(); "
        "assert {'train', 'load', 'register'} <= set(dir(lakd_jax)); lakd_jax.nothing"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("has no attribute 'nothing'")
