"""Nothing that a user points at runs code, leaves its folder, or calls anyone."""

import io
import json
import pathlib
import pickle
import struct
import tarfile
import zlib

import audit
import commands
import numpy as np
import pytest
import states
import tiny
from PIL import Image
from tensorflow_datasets.core.download import extractor

from lakd_jax import data, errors, interop, models
from lakd_jax.data import images
from lakd_jax.hme import report
from lakd_jax.interop import weights
from lakd_jax.report import metrics, model_card
from lakd_jax.store import checkpoint, workdir

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
SCRIPT = "<script>alert(1)"


def test_the_watch_sees_what_it_is_for():
    with pytest.raises(AssertionError), audit.without(*audit.CODE) as seen:
        with pytest.raises(PermissionError):
            pickle.loads(pickle.dumps(pathlib.PurePosixPath("x")))
    assert "PurePosixPath" in seen[0]


# ----------------------------------------------------- weights and checkpoints


def saved_student(path, **changes):
    """A student's file whose card has these entries instead of its own."""
    model = models.create("resnet8", num_classes=3)
    variables = tiny.variables(model)
    card = {"network": "resnet8", "num_classes": 3, "options": {}, "vam": None}
    card |= {"mean": (0.4,) * 3, "std": (0.3,) * 3, "image_size": 8, "result": {}}
    card["preparation"] = None
    card |= changes
    interop.save_variables(path, variables, card)
    return path


def test_reading_a_run_unpickles_nothing_and_starts_nothing(copied, tmp_path):
    """Checkpoints, weights, metrics and results are arrays and JSON."""
    file = saved_student(tmp_path / "student.safetensors")
    workdir.write_json(tmp_path / "result.json", {"a": 1})
    (tmp_path / metrics.FILENAME).write_text('{"step": 1, "kind": "train"}\n')
    with audit.without(*audit.CODE, *audit.NETWORK):
        assert checkpoint.restore_step(copied, 2, states.make_state())[0] == 2
        assert weights.student(file, "float32")[1]["network"] == "resnet8"
        assert workdir.read_json(tmp_path / "result.json") == {"a": 1}
        assert len(metrics.read(tmp_path)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "../../resnet8"},
        {"network": ["resnet8"]},
        {"network": None},
        {"num_classes": 10**12},
        {"num_classes": "3"},
        {"options": {"__class__": "x"}},
        {"options": [1]},
        {"options": {"num_classes": 4}},
        {"vam": {"gate": "dynamic", "more": 1}},
        {"vam": 3},
        {"mean": "abc"},
        {"mean": [0.1]},
        {"std": None},
        {"preparation": {"height": 8, "run": "x"}},
        {"preparation": 3},
    ],
)
def test_a_made_up_card_is_an_error_in_a_line(changes, tmp_path):
    file = saved_student(tmp_path / "student.safetensors", **changes)
    with pytest.raises(errors.TeacherError, match="is not a student of a run"):
        weights.student(file, "float32")


@pytest.mark.parametrize("text", [None, "{", "[1]", "3"])
def test_metadata_that_is_no_card_is_an_error_in_a_line(text, tmp_path):
    import safetensors.numpy

    header = {"format": "lakd_jax"} | ({} if text is None else {"metadata": text})
    path = tmp_path / "student.safetensors"
    safetensors.numpy.save_file({"params/a": np.ones(2)}, path, metadata=header)
    with pytest.raises(errors.TeacherError, match="its metadata cannot be read"):
        interop.load_variables(path)


# -------------------------------------------------------------- images, archives


def chunk(kind, content):
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png_of(width, height):
    """A PNG file of a few bytes that claims to be this large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (
        chunk(b"IHDR", head),
        chunk(b"IDAT", zlib.compress(b"")),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [9000, 30_000])
@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(errors.DataError) as caught:
        images.decode(png_of(side, side), 32, "bomb.png")
    text = str(caught.value)
    assert text.startswith("bomb.png: not a readable image") and "pixels" in text
    assert "\n" not in text and text.endswith("Delete or replace it.")


def test_a_postscript_program_called_png_is_not_run():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    assert Image.open(io.BytesIO(file.getvalue())).format == "EPS"  # Pillow's would
    with audit.without(*audit.CODE):
        with pytest.raises(errors.DataError, match=r"x\.png: not a readable image"):
            images.decode(file.getvalue(), 0, "x.png")


def test_links_in_image_folders_are_read_as_images_only(tmp_path):
    """Links to images are a usual way to make subsets; of others nothing is told."""
    secret = tmp_path / "secret.txt"
    secret.write_text("very secret")
    Image.new("RGB", (8, 8)).save(tmp_path / "real.png")
    for role in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / role / name).mkdir(parents=True)
            (tmp_path / role / name / "1.png").symlink_to(tmp_path / "real.png")
    assert len(data.load(f"folder:{tmp_path}").train) == 2
    (tmp_path / "train" / "a" / "2.png").symlink_to(secret)
    with pytest.raises(errors.DataError, match="not a readable image") as caught:
        data.load(f"folder:{tmp_path}")
    assert "very secret" not in str(caught.value)


def test_a_community_set_is_not_fetched(tmp_path):
    """Its builder would be a program from the internet."""
    for name in ("someone:cifar10", "huggingface:cifar10", "kaggle:a/b"):
        with audit.without(*audit.NETWORK):
            with pytest.raises(errors.DataError, match="code of their own"):
                data.load(name, data_dir=str(tmp_path))
    with pytest.raises(errors.DataError, match="is no data set of tfds"):
        data.load("nosuchset:1.0.0", data_dir=str(tmp_path))  # that is a version


def test_members_outside_an_archive_are_not_given_out():
    """Of tfds, which unpacks where TensorFlow prepares a set."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in ("../outside", "/tmp/outside", "a/../../outside", "inside"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    file.seek(0)
    assert [path for path, _ in extractor.iter_tar(file)] == ["inside"]


# ------------------------------------------------------------------- what is shown


def test_names_of_classes_are_text_on_every_page(tmp_path):
    params = {"head": {"gate": {"logits": np.eye(3)}}}
    for stage in ("stage2", "stage3"):
        params[stage] = {"block1": {"gate": {"logits": np.eye(3)}}}
    names = (SCRIPT, "b</pre><img src=x onerror=alert(1)>", "c")
    text = "".join(report.section(params, names, SCRIPT, tmp_path))
    assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text  # it is there, and it is text


@pytest.mark.long
def test_no_network_and_no_code_in_a_run(main, tmp_path):
    """A run on the digits, its export and its report: not one connection is tried."""
    run = tmp_path / f"{SCRIPT}-run"
    args = ("epochs=1", "method=none", "baselines=()", "student.name=resnet8")
    fields = [f"--config.{a}" for a in (*args, "data.image_size=8", "compile_cache=")]
    with audit.without(*audit.NETWORK, "pickle.find_class", "os.system"):
        for command in (
            [commands.DIGITS, *fields],
            ["--mode=explain"],
            ["--mode=export", "--to=safetensors"],
            ["--mode=export", "--to=stablehlo"],
        ):
            code, _, err = main(*command, f"--workdir={run}")
            assert code == 0, err
    assert "<script" not in (run / "report.html").read_text()


def test_names_of_classes_and_folders_are_text_in_the_model_card():
    from lakd_jax import config

    score = {"accuracy": 1.0, "right": 1, "examples": 1}
    result = {"parameters": 1, "test_last": score, "method": "none", "teacher": None}
    result |= {"data": "0", "epochs": 1, "seed": 0, "class_names": [SCRIPT, "```"]}
    card = {"network": "resnet8", "options": {}, "num_classes": 2, "result": result}
    card |= {"mean": (0.4,) * 3, "std": (0.3,) * 3, "preparation": None}
    settings = config.to_dict(config.default())
    settings["data"]["source"] = f"folder:/{SCRIPT}"
    text = model_card.render(card, settings, {}, [])
    names = json.dumps(result["class_names"])
    assert f"\n```json\n{names}\n```\n" in text
    rest = text.replace(names, "").replace(f'`"folder:/{SCRIPT}"`', "")
    assert "<script" not in rest and "&lt;script&gt;" in rest
