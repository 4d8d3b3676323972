"""Evaluating a finished run: on its test split, on other images, by the command."""

import csv
import json
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

import lakd_jax
from lakd_jax import cli, errors, evaluation
from lakd_jax.runtime import interrupt

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("tiny_data"),
]
TEST = tiny.split(45, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("evaluation")
    config = tiny.small(folder, epochs=2, method="kd", student__image_size=12)
    return lakd_jax.train(config, folder / "run")


def written(run):
    return json.loads((run.directory / "evaluation" / "evaluation.json").read_text())


def table(run):
    with open(run.directory / "evaluation" / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_test_split_has_the_scores_of_the_result(run):
    result, last = run.evaluate(), run.result["test_last"]
    assert result == written(run)
    scores = ("accuracy", "mean_over_classes", "calibration_error", "agreement")
    assert {k: result[k] for k in scores} == {k: last[k] for k in scores}
    answers = run(TEST.images).argmax(-1)
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (TEST.labels, answers), 1)
    assert result["confusion"] == counts.tolist()
    assert sum(n for *_, n in result["confused"]) == 45 - last["right"]
    assert result["confused"] == run.result["confused"]
    rows = table(run)
    assert [r["predicted"] for r in rows] == run.predict(TEST.images)
    assert [r["true"] for r in rows] == [tiny.CLASSES[k] for k in TEST.labels]
    assert (run.directory / "evaluation" / "confusion.png").exists()


@pytest.fixture
def photos(tmp_path):
    """Oblong photos of the test images in folders of their classes."""
    for i, (image, label) in enumerate(zip(TEST.images, TEST.labels, strict=True)):
        place = tmp_path / "photos" / tiny.CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        wide = np.zeros((8, 14, 3), np.uint8)
        wide[:, 3:11] = image
        Image.fromarray(wide).save(place / f"{i:02}.png")
    return tmp_path / "photos"


def test_photos_of_class_folders_get_the_answers_of_the_test_split(run, photos):
    result = run.evaluate(images=photos)
    assert result["examples"] == 45 and result["agreement"] is None
    assert result["accuracy"] == run.accuracy
    rows = table(run)
    assert rows[0]["file"].startswith("dark/") and rows[0]["true"] == "dark"
    files = [photos / row["file"] for row in rows]
    assert run.predict(files) == [row["predicted"] for row in rows]
    assert run.predict(str(files[0])) == [rows[0]["predicted"]]
    with Image.open(files[0]) as image:
        assert run.predict(image) == [rows[0]["predicted"]]


def test_photos_without_labels_are_answered(run, photos):
    right = int((TEST.labels == 1).sum())
    result = run.evaluate(images=photos / "left")
    assert result.keys() == {"data", "examples", "answers"}
    assert sum(result["answers"].values()) == result["examples"] == right
    assert {row["true"] for row in table(run)} == {""}
    with pytest.raises(errors.DataError, match="holds no images"):
        run.evaluate(images=run.directory / "checkpoints")


def test_only_the_images_may_change(run):
    with interrupt.Guard() as guard, pytest.raises(errors.ConfigError) as caught:
        evaluation.run(run.directory, changes={"epochs": 3, "seed": 1}, guard=guard)
    assert "epochs cannot be changed in an evaluation" in str(caught.value)


@pytest.mark.parametrize(
    "flags, line",
    [
        ([], "--workdir is missing"),
        (["--to=torch"], "--to has no effect with --mode=evaluate"),
        (["--config.epochs=1"], "epochs cannot be changed here"),
    ],
)
def test_faults_of_the_command(run, capsys, flags, line):
    flags = flags and [f"--workdir={run.directory}", *flags]
    with pytest.raises(SystemExit) as ended:
        cli.main(["--mode=evaluate", *flags])
    assert ended.value.code == 2 and line in capsys.readouterr().err


def test_the_command_reports_the_scores(run, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--mode=evaluate", f"--workdir={run.directory}"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"accuracy             {100 * run.accuracy:.2f} %" in shown
    assert "agrees with teacher" in shown


def test_the_package_of_a_tracker_is_not_needed(run, monkeypatch):
    file = run.directory / "config.json"
    recorded = file.read_text()
    monkeypatch.setitem(sys.modules, "wandb", None)
    try:
        file.write_text(json.dumps(json.loads(recorded) | {"trackers": ["wandb"]}))
        assert run.evaluate()["accuracy"] == run.accuracy
    finally:
        file.write_text(recorded)
