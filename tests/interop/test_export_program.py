"""Exports that contain the whole computation, and those of the best epoch."""

import sys

import jax
import numpy as np
import pytest
import tiny

import lakd_jax
from lakd_jax import errors, export
from lakd_jax.interop import weights
from lakd_jax.store import workdir

pytestmark = pytest.mark.usefixtures("tiny_data")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("export")
    return lakd_jax.train(tiny.small(folder, epochs=2, method="none"), folder / "r")


def test_onnx_computes_the_same_for_any_batch(run):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    with jax.numpy_rank_promotion("allow"):  # its plugins add biases so
        session = onnxruntime.InferenceSession(run.export("onnx"))
    (given,) = session.get_inputs()
    assert given.type == "tensor(uint8)" and given.shape[1:] == [8, 8, 3]
    for count in (1, 5):
        images = tiny.split(count, 3).images
        (logits,) = session.run(None, {given.name: images})
        np.testing.assert_allclose(logits, run(images), rtol=1e-5, atol=1e-5)
    card = (run.directory / "export" / "small.md").read_text()
    assert 'onnxruntime.InferenceSession("small.onnx")' in card


def test_onnx_without_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(errors.ExportError, match=r'pip install "lakd-jax\[onnx\]"'):
        run.export("onnx")


def test_the_best_epoch_is_exported(run):
    path = run.export("safetensors", which="best")
    assert path.name == "small-best.safetensors"
    best, _ = weights.student(run.directory / workdir.BEST, "float32")
    score = run.result["test_best_on_minival"]
    answers = export.predictor(best)(tiny.split(45, 2).images).argmax(-1)
    assert int((answers == tiny.split(45, 2).labels).sum()) == score["right"]
    card = path.with_suffix(".md").read_text()
    when = f"after step {run.result['best_step']}, the best on minival"
    assert f"({score['right']} of 45 images right) {when}" in card


def test_a_run_without_minival_has_no_best_epoch(run, tmp_path):
    (run.directory / workdir.BEST).rename(tmp_path / "away")
    try:
        with pytest.raises(errors.ExportError, match="without a minival split"):
            run.export("torch", which="best")
    finally:
        (tmp_path / "away").rename(run.directory / workdir.BEST)
    with pytest.raises(errors.ConfigError, match="--which is 'bets'; did you mean"):
        run.export("torch", which="bets")
