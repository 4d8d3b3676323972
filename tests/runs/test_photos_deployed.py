"""From photos as people have them to a deployed student: all ways give one answer."""

import jax
import numpy as np
import pytest
import tiny
import torch_files
from PIL import Image

import lakd_jax
from lakd_jax import interop, models
from lakd_jax.data import layout

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
COLOURS = {"red": (200, 40, 30), "green": (40, 190, 40), "blue": (40, 50, 210)}


def photograph(path, colour, number):
    """Writes an oblong photo: WebP, CMYK JPEG, or turned with an EXIF tag."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 60, (24, 40, 3)) + np.array(colour) // 2
    pixels[:12] += 40
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = number % 3
    if kind == 0:
        image.save(path.with_suffix(".webp"), lossless=True)
    elif kind == 1:
        image.convert("CMYK").save(path.with_suffix(".JPEG"), quality=95)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(path.with_suffix(".jpg"), exif=exif, quality=95)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ with nested folders; val/ without one of the classes."""
    root = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        for k in range(24):
            place = root / "train" / name / ("more/of them" if k % 2 else "")
            photograph(place / f"{k}.x", colour, k)
        for k in range(8 if name != "blue" else 0):
            photograph(root / "val" / name / f"{k}.x", colour, 100 + k)
    (root / "train" / "red" / "notes.txt").write_text("not an image")
    return root


def config(photos, **fields):
    c = lakd_jax.config.default()
    c.update(epochs=3, batch_size=16, eval_batch_size=16, log_every=4)
    c.data.update(source=f"folder:{photos}", image_size=16, pad=1, minival=0.0)
    c.optim.update(lr=0.05, schedule="cosine", warmup_epochs=1.0)
    c.student.name = c.teacher.name = "resnet8"
    return lakd_jax.config.changed(c, {"compile_cache": "", **fields})


@pytest.mark.long
def test_all_ways_give_one_answer(photos, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    # A network as a PyTorch user saved it: for other classes, in an older run.
    drawn = interop.to_torch(
        "resnet8", tiny.variables(models.create("resnet8", num_classes=10))
    )
    start = tmp_path / "checkpoint.pth.tar"
    torch_files.save(start, {"epoch": 3, "model_state_dict": drawn, "loss": 0.5})
    fields = {"student.init": str(start), "student.new_head": True, "method": "none"}
    first = lakd_jax.train(config(photos, **fields), tmp_path / "first")
    assert "1 .txt" in capsys.readouterr().err  # left out, and said so
    assert first.classes == ("blue", "green", "red")

    # That run teaches one whose classes are in another order.
    order = tuple(COLOURS)
    arrays = {"classes": np.array(order)}
    files = {}
    for role, folder in (("train", "train"), ("test", "val")):
        files[role] = layout.image_files(photos / folder)
        above = [f.relative_to(photos / folder).parts[0] for f in files[role]]
        arrays[f"{role}_images"] = first.preparation.all(files[role])
        arrays[f"{role}_labels"] = np.array([order.index(name) for name in above])
    np.savez(tmp_path / "photos.npz", **arrays)
    fields = {"method": "kd", "teacher.init": str(first.directory)}
    fields |= {"data.source": f"npz:{tmp_path / 'photos.npz'}", "teacher.floor": 0.01}
    run = lakd_jax.train(config(photos, **fields), tmp_path / "run")
    assert "put into the order of the data's" in capsys.readouterr().out
    assert run.result["teacher_test"]["right"] == first.result["test_last"]["right"]

    scores = run.evaluate()
    logits = run(files["test"])  # from the photos
    right = logits.argmax(-1) == arrays["test_labels"]
    assert scores["examples"] == 16 and scores["agreement"] is not None
    assert right.mean() == scores["accuracy"] == run.accuracy
    assert run.predict(files["test"]) == [order[k] for k in logits.argmax(-1)]
    np.testing.assert_allclose(run(arrays["test_images"]), logits, atol=1e-4)

    with jax.numpy_rank_promotion("allow"):
        session = onnxruntime.InferenceSession(run.export("onnx"))
    given = {session.get_inputs()[0].name: arrays["test_images"]}
    np.testing.assert_allclose(
        session.run(None, given)[0], logits, rtol=1e-4, atol=1e-4
    )
