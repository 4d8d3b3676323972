"""Image folders as people have them: where splits and classes are, what is left out."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from lakd_jax import data, errors
from lakd_jax.data.streaming import batches

VIEWS = batches.Views(4, (1.0, 1.0), 4)


def fill(folder: pathlib.Path, count: int = 4, suffix: str = ".png") -> None:
    """Writes images that are different in every folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(str(folder).encode()) + len(list(folder.iterdir())))
    for k in range(count):
        pixels = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}{suffix}")


def made(root: pathlib.Path, *roles: str, classes=("cat", "dog")) -> pathlib.Path:
    for role in roles:
        for name in classes:
            fill(root / role / name)
    return root


def loaded(root, **options):
    return data.load(f"folder:{root}", **options)


def streamed(root, minival=0.0, **options):
    source = f"folder:{root}"
    options = {"data_dir": "", "workers": 0, **options}
    return batches.load(source, VIEWS, minival=minival, **options)


def sizes(found) -> tuple:
    minival = len(found.minival) if found.minival else None
    return len(found.train), minival, len(found.test)


def failure(root, **options) -> str:
    with pytest.raises(errors.DataError) as caught:
        loaded(root, **options)
    text = str(caught.value)
    assert text.count("\n") < 6
    return text


# --------------------------------------------------------------------- what is read


def test_every_format_is_read_in_nested_folders_and_the_rest_counted(tmp_path, capsys):
    made(tmp_path, "train", "test")
    cat = tmp_path / "train" / "cat"
    suffixes = [".webp", ".BMP", ".gif", ".tif", ".TIFF", ".JPG", ".jpeg"]
    for suffix in suffixes:
        fill(cat / "more" / "deeper", 1, suffix)
    for suffix in (".jfif", ".jpe"):
        (cat / f"x{suffix}").write_bytes((cat / "more/deeper/0.JPG").read_bytes())
    for name in ("a.heic", "b.HEIC", "notes.txt", "._0.png", "README"):
        (cat / name).write_bytes(b"x")
    fill(tmp_path / "train" / "__MACOSX" / "cat")
    fill(cat / ".ipynb_checkpoints")
    fill(tmp_path / "extra")
    found = loaded(tmp_path)
    assert np.bincount(found.train.labels).tolist() == [4 + len(suffixes) + 2, 4]
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("2 .heic", "1 .txt", "3 hidden", "1 without a suffix", "folder extra"):
        assert part in line
    assert len(streamed(tmp_path).train) == len(found.train)


def test_a_link_to_a_folder_above_ends(tmp_path):
    made(tmp_path, "train", "test")
    (tmp_path / "train" / "cat" / "up").symlink_to(tmp_path / "train" / "cat")
    assert sizes(loaded(tmp_path)) == (8, None, 8)


# --------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("Train", "Test"), (8, None, 8)),
        (("training", "TESTING"), (8, None, 8)),
        (("train", "val"), (8, None, 8)),
        (("train", "validation"), (8, None, 8)),
        (("train", "valid", "test"), (8, 8, 8)),
    ],
)
@pytest.mark.parametrize("read", [loaded, streamed])
def test_split_folders_by_their_usual_names(read, roles, expected, tmp_path):
    assert sizes(read(made(tmp_path, *roles))) == expected


@pytest.mark.parametrize("read", [loaded, streamed])
def test_a_val_folder_is_the_minival_and_nothing_else_is_held_out(read, tmp_path):
    made(tmp_path, "train", "val", "test")
    without = read(tmp_path).fingerprint()
    found = read(tmp_path, minival=0.25)
    assert sizes(found) == (8, 8, 8) and found.fingerprint() == without
    held = found.minival.take(np.arange(8)).images
    val = [np.asarray(Image.open(p)) for p in sorted(tmp_path.glob("val/*/*.png"))]
    np.testing.assert_array_equal(held, val)
    fill(tmp_path / "val" / "cat", 5)
    assert read(tmp_path).fingerprint() != without


def tiny_imagenet(root):
    for name in ("n01", "n02"):
        fill(root / "train" / name / "images")
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    fill(root / "val" / "images", 3)
    table = "2.png\tn01\t0\t0\t62\t62\n0.png\tn02\t1\n1.png\tn01\t1\n"
    (root / "val" / "val_annotations.txt").write_text(table)
    fill(root / "test" / "images", 5)
    return root


def test_tiny_imagenet_as_unpacked(tmp_path, capsys):
    found = loaded(tiny_imagenet(tmp_path))
    assert found.classes == ("n01", "n02") and sizes(found) == (8, None, 3)
    assert found.test.labels.tolist() == [0, 0, 1]
    order = [
        np.asarray(Image.open(tmp_path / f"val/images/{k}.png")) for k in (1, 2, 0)
    ]
    np.testing.assert_array_equal(found.test.images, order)
    (line,) = capsys.readouterr().err.splitlines()
    assert "5 images of test/ without a class" in line and "2 .txt" in line
    (tmp_path / "val" / "images" / "1.png").unlink()
    assert "1 images of val_annotations.txt are missing, such as 1.png" in failure(
        tmp_path
    )


@pytest.mark.parametrize("read", [loaded, streamed])
@pytest.mark.parametrize("roles", [("",), ("train",)])
def test_a_share_is_tested_on_where_there_is_one_split(read, roles, tmp_path):
    made(tmp_path, *roles)
    found = read(tmp_path, test_share=0.25)
    assert sizes(found) == (6, None, 2)
    train, test = (s.take(np.arange(len(s))) for s in (found.train, found.test))
    assert test.labels.tolist() == [0, 1]  # stratified
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}
    again = read(tmp_path, test_share=0.25)
    assert again.fingerprint() == found.fingerprint()
    assert sizes(read(tmp_path, test_share=0.25, minival=0.34)) == (4, 2, 2)


@pytest.mark.parametrize("share", [1e-6, 0.9])
def test_a_share_that_leaves_a_class_nothing_is_refused(share, tmp_path):
    assert "data.test_share" in failure(made(tmp_path, "train"), test_share=share)


def test_a_share_of_data_with_a_test_split_is_refused(tmp_path):
    made(tmp_path, "train", "val")
    text = failure(tmp_path, test_share=0.2)
    assert "val is: set it to 0" in text
    with pytest.raises(errors.DataError, match="digits has one: set it to 0"):
        data.load("digits", test_share=0.2)


# --------------------------------------------------------------------------- errors


def test_errors_say_which_folder_or_field_would_do(tmp_path):
    flat = made(tmp_path / "flat", "")
    assert "(cat, dog)" in failure(flat) and "set data.test_share" in failure(flat)
    only = made(tmp_path / "only", "train")
    assert "nor val/" in failure(only) and "set data.test_share" in failure(only)
    inner = made(tmp_path / "outer" / "unpacked" / "set", "train", "test")
    assert f"would do: data.source=folder:{inner}" in failure(tmp_path / "outer")
    assert f"Use its parent: data.source=folder:{inner}" in failure(inner / "train")
    caltech = made(tmp_path / "caltech" / "objects", "")
    assert f"folder:{caltech} with data.test_share" in failure(caltech.parent)
    fill(only / "test", 3)
    assert "test has images but no class folders" in failure(only)
    (tmp_path / "heic/train/cat").mkdir(parents=True)
    (tmp_path / "heic/train/cat/a.heic").write_bytes(b"x")
    assert "There are 1 .heic." in failure(tmp_path / "heic")


def test_a_class_missing_in_test_or_val_is_a_line(tmp_path, capsys):
    made(tmp_path, "train", "val", "test", classes=("cat", "dog", "elk"))
    for role, name in (("test", "elk"), ("val", "cat")):
        for path in (tmp_path / role / name).iterdir():
            path.unlink()
    found = loaded(tmp_path)
    assert found.classes == ("cat", "dog", "elk")
    assert set(found.test.labels) == {0, 1} and set(found.minival.labels) == {1, 2}
    first, second = capsys.readouterr().err.splitlines()
    assert "no test images of 1 of 3 classes: elk" in first
    assert "no minival images of 1 of 3 classes: cat" in second


@pytest.mark.parametrize("role", ["test", "val"])
def test_a_class_that_is_not_trained_is_an_error(role, tmp_path):
    made(tmp_path, "train", "val", "test")
    fill(tmp_path / role / "Dog")
    assert f"only in {role}/: Dog" in failure(tmp_path)


def test_numbers_are_sorted_as_text_with_a_line(tmp_path, capsys):
    made(tmp_path, "train", "test", classes=("2", "9", "10"))
    assert loaded(tmp_path).classes == ("10", "2", "9")
    (line,) = capsys.readouterr().err.splitlines()
    assert "labels 0, 1, 2, ... are 10, 2, 9" in line


def test_the_same_image_in_train_and_test_is_counted(tmp_path, capsys):
    made(tmp_path, "train", "test")
    same = (tmp_path / "train" / "cat" / "0.png").read_bytes()
    (tmp_path / "test" / "dog" / "renamed.png").write_bytes(same)
    loaded(tmp_path, minival=0.25)
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 9 test images are training images" in line
