"""The same work for all: networks, losses and steps of peers are held to ours."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import child, ours, same_run, subjects, throughput, throughput_table
from benchmarks import work as work_lib
from lakd_jax import interop
from lakd_jax.distill import kd

os.environ.setdefault("KERAS_BACKEND", "jax")  # before it is imported

# PyTorch's own, when its optimisers and fused modules are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

WIDTHS = (16, 16, 32, 64)


@pytest.fixture(name="keras_step")
def _keras_step():
    pytest.importorskip("keras")
    from benchmarks import keras_step

    with jax.numpy_rank_promotion("allow"):  # Keras's layers add a bias as it is
        yield keras_step


@functools.cache
def made():
    """resnet8 from a resnet8 that pads with zeros where widths change."""
    fields = {"data.pad": 0, "data.flip": False, "teacher.shortcut": "identity"}
    fields |= {"optim.weight_decay": 0.0, "teacher.fold": False}
    return ours.setup(ours.configure("resnet8", "resnet8", "kd", 8, "float32", fields))


def perturbed(variables, seed=0):
    """With random norms, so that no part of a network is as if it were missing."""
    rng = np.random.default_rng(seed)

    def change(x):
        noise = rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        return np.asarray(x) * noise + 0.1 * rng.random(x.shape, np.float32)

    return jax.tree.map(change, jax.device_get(variables))


def images(count=4):
    """Normalised images (count, 32, 32, 3)."""
    return np.random.default_rng(1).normal(size=(count, 32, 32, 3)).astype(np.float32)


def networks():
    """Ours and PyTorch's weights, with projections and without."""
    setup = made()
    student = perturbed(setup.state.variables("student"))
    teacher = perturbed(setup.teacher)
    for model, variables in (
        (setup.spec.student, student),
        (setup.spec.teacher, teacher),
    ):
        logits = model.apply(variables, images(), train=False).logits
        yield variables, np.asarray(logits), interop.to_torch("resnet8", variables)


def test_keras_networks_have_our_parameters_and_logits(keras_step):
    for variables, logits, weights in networks():
        network = keras_step.network(weights)
        trained = sum(v.size for v in jax.tree.leaves(variables["params"]))
        counts = [np.prod(v.shape) for v in network.trainable_variables]
        assert sum(counts) == trained
        found = np.asarray(network(images(), training=False))
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_pytorch_networks_have_our_logits_with_either_shortcut():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_step

    for _, logits, weights in networks():
        for same in (weights, work_lib.projected(weights, WIDTHS)):
            network = torch_step.network("resnet8", same)
            assert any(".downsample." in key for key in same) or same is weights
            found = torch_step.predict(network, images(), torch.device("cpu"))
            np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_keras_distiller_has_our_loss(keras_step):
    setup = made()
    work = setup.work(setup.rows(2, 1), anew=False)
    weights = {
        **work.student_weights,
        "fc.weight": 9 * work.student_weights["fc.weight"],
    }
    distiller = keras_step.distiller(dataclasses.replace(work, student_weights=weights))
    x, labels = images(), np.array([3, 1, 4, 1])
    logits = distiller.student(x, training=False)
    theirs = distiller.teacher(x, training=False)
    options = work.methods["kd"]
    soft = kd.kd_loss(np.asarray(logits), np.asarray(theirs), options["temperature"])
    hard = kd.cross_entropy(np.asarray(logits), labels)
    expected = options["ce_weight"] * hard + options["kd_weight"] * soft
    assert float(soft) > 0.1  # so that the comparison sees it
    found = distiller.compute_loss(x, labels, logits)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def is_baseline(subject, work):
    """Whether its student is the baseline's after three steps."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_step

    baseline = subjects.make("torch eager", work, "")
    for one in (subject, baseline):
        one.run(2)  # after the first
    expected = baseline.predict(images())
    start = torch_step.network("resnet8", work.student_weights)
    moved = torch_step.predict(start, images(), torch.device("cpu")) - expected
    assert np.abs(moved).max() > 0.2  # so that the comparison sees the steps
    return np.allclose(subject.predict(images()), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.long
def test_keras_takes_the_steps_of_the_baseline(keras_step):
    """The baseline's are held to ours, see test_benchmarks_throughput."""
    setup = made()
    work = setup.work(setup.rows(3, 1), anew=True)
    assert is_baseline(keras_step.Keras(work), work)
    other = dataclasses.replace(work, lr=2 * work.lr)
    assert not is_baseline(keras_step.Keras(work), other)


def test_torchdistill_takes_the_steps_of_the_baseline():
    for module in ("torch", "torchdistill", "yaml", "scipy"):
        pytest.importorskip(module)
    if not importlib.util.find_spec("torchvision"):  # importing it may fail, see peers
        pytest.skip("needs torchvision")
    setup = made()
    work = setup.work(setup.rows(3, 1), anew=True)
    work = dataclasses.replace(work, weight_decay=0.1)
    assert is_baseline(subjects.make("torchdistill", work, ""), work)


def test_batches_are_windows_of_the_padded_images():
    work = dataclasses.replace(
        made().work(np.full((3, 40), 5, np.int32), anew=True), pad=2, flip=True
    )
    padded = np.pad(work.images[5], ((2, 2), (2, 2), (0, 0)))
    unit = work_lib.normalised(work, padded)
    windows = [
        unit[y : y + 32, x : x + 32][:, :: -1 if flip else 1]
        for y in range(5)
        for x in range(5)
        for flip in (False, True)
    ]
    batches = work.batches()
    crops, labels, row = next(batches)
    nearest = [
        [i for i, w in enumerate(windows) if np.abs(w - crop).max() < 1e-5]
        for crop in crops
    ]
    assert all(len(found) == 1 for found in nearest)
    assert len({found[0] for found in nearest}) > 20  # of 50
    assert (labels == work.labels[5]).all() and (row == 5).all()
    later = [next(batches)[0] for _ in range(3)]
    assert not any(np.array_equal(crops, other) for other in later)
    prepared = dataclasses.replace(work, anew=False).batches()
    first, *_, again = [next(prepared)[0] for _ in range(5)]
    assert np.array_equal(first, again)


def test_normalised_is_of_values_in_0_to_1():
    work = made().work(made().rows(1, 1), anew=True)
    white = work_lib.normalised(work, np.full((1, 1, 1, 3), 255, np.uint8))
    expected = (1 - np.array(work.mean)) / np.array(work.std)
    np.testing.assert_allclose(white[0, 0, 0], expected, rtol=1e-5)


def test_every_epoch_has_each_example_once_in_another_order():
    order = same_run._order(10, 3, 2, 0)
    assert order.tolist() == same_run._order(10, 3, 2, 0).tolist()
    assert order.tolist() != same_run._order(10, 3, 2, 1).tolist()
    assert order.shape == (6, 3)
    epochs = order[:3].ravel(), order[3:].ravel()
    assert [len(set(epoch)) for epoch in epochs] == [9, 9]
    assert epochs[0].tolist() != epochs[1].tolist()
    labels = np.array([1, 0, 1, 1, 0, 0])
    assert same_run._first(labels, 2).tolist() == [0, 1, 2, 4]


def test_what_a_child_is_asked_for():
    class Fake:
        steps = 0

        def run(self, steps):
            self.steps += steps

        def predict(self, pixels):
            return np.eye(10)[np.arange(len(pixels))]

    work = dataclasses.replace(
        made().work(made().rows(1, 1), anew=True),
        test_images=np.zeros((4, 32, 32, 3), np.uint8),
        test_labels=np.array([0, 1, 2, 9]),
    )
    fake = Fake()
    assert child._answer(fake, work, {"run": 7})["cpu_s"] >= 0 and fake.steps == 7
    assert child._answer(fake, work, {"test": True}) == {"right": 3}
    assert child._answer(fake, work, {"peak": True})["bytes"] > 2**26


def test_a_process_of_a_peer_has_no_jax():
    pytest.importorskip("torch")
    code = "import benchmarks.child, benchmarks.peers, sys; print(*sys.modules)"
    root = pathlib.Path(child.__file__).parents[1]
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=True
    )
    modules = set(found.stdout.split())
    assert "torch" in modules and not modules & {"jax", "flax", "lakd_jax"}


@pytest.mark.long
def test_a_training_in_turn_is_recorded(tmp_path, capfd):
    """Two processes, three epochs of four steps on black and white images."""
    pytest.importorskip("torch")
    for role, count in (("train", 20), ("test", 5)):
        for label, shade in (("black", 0), ("white", 255)):
            folder = tmp_path / "images" / role / label
            folder.mkdir(parents=True)
            for i in range(count):
                colour = (abs(shade - i), shade, shade)
                Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
    throughput.main(
        [
            *("--pair=resnet8,resnet8", "--method=kd", "--batch=8", "--epochs=3"),
            *("--peer=torch-eager", f"--images={tmp_path}/images", "--warm_up=1"),
            *("--steps=2", "--plain", f"--results={tmp_path}/results"),
        ]
    )
    [file] = (tmp_path / "results").iterdir()
    record = json.loads(file.read_text())
    method = record["methods"]["kd"]
    assert str(tmp_path) not in json.dumps(record)
    assert file.stem.endswith("-plain") and method["command"].endswith(" --plain")
    assert (method["turns"], method["train_images"], method["test_images"]) == (
        4,
        36,
        10,
    )
    assert method["subjects"].keys() == {"ours", "torch eager"}
    for subject in method["subjects"].values():
        assert subject["step_s"]["median"] > 0 and subject["cpu_s"]["median"] > 0
        assert subject["peak_bytes"] > 2**26 and 0 <= subject["right"] <= 10
    ratios = method["ratios"]
    assert ratios["step_s"].keys() == ratios["cpu_s"].keys() == {"torch eager"}
    lines = throughput_table.render([record]).splitlines()
    assert len(lines) == 4 and "| ours |" in lines[2] and "| torch eager |" in lines[3]
    assert lines[3].count("|") == lines[0].count("|")
