"""Image folders: reading, sizes, colour modes and errors."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from lakd_jax import data, errors
from lakd_jax.data import images


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    shape = (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: pathlib.Path, array: np.ndarray, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).convert(mode).save(path)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of two classes, each with three training images and one test image."""
    for label, name in enumerate(("bird", "cat")):
        for k in range(3):
            write(tmp_path / "train" / name / f"{k}.png", pixels(10 * label + k))
        write(tmp_path / "test" / name / "0.png", pixels(10 * label + 9))
    return tmp_path


def failure(root: pathlib.Path, **options) -> str:
    with pytest.raises(errors.DataError) as caught:
        data.load(f"folder:{root}", **options)
    text = str(caught.value)
    assert text.count("\n") < 10
    return text


@pytest.mark.parametrize("size", [0, 8])
def test_reads_images_labels_and_ids_in_sorted_order(root, size):
    found = data.load(f"folder:{root}", image_size=size)
    assert found.classes == ("bird", "cat")
    expected = np.stack([pixels(seed) for seed in (0, 1, 2, 10, 11, 12)])
    np.testing.assert_array_equal(found.train.images, expected)
    assert found.train.images.dtype == np.uint8
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.train.ids.tolist() == list(range(6))
    np.testing.assert_array_equal(found.test.images, [pixels(9), pixels(19)])
    assert found.test.labels.tolist() == [0, 1]


def test_other_files_hidden_files_and_suffix_case(root):
    (root / "train" / "bird" / "notes.txt").write_text("x")
    (root / "train" / "bird" / ".hidden.png").write_bytes(b"x")
    (root / "train" / ".cache").mkdir()
    write(root / "train" / "bird" / "Z.PNG", pixels(50))
    write(root / "train" / "bird" / "jpeg.jpeg", pixels(51))
    found = data.load(f"folder:{root}")
    assert np.bincount(found.train.labels).tolist() == [5, 3]
    np.testing.assert_array_equal(found.train.images[3], pixels(50))  # "Z" < "j"


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_colour_modes_become_rgb(root, mode):
    path = root / "train" / "bird" / "1.png"
    write(path, pixels(1), mode)
    expected = np.asarray(Image.open(path).convert("RGBA"))[..., :3]
    found = data.load(f"folder:{root}").train.images[1]
    assert found.shape == (8, 8, 3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("error")
def test_a_transparent_palette_is_read_without_a_warning(root):
    path = root / "train" / "bird" / "1.png"
    palette = Image.fromarray(pixels(1)).quantize(16)
    palette.save(path, transparency=bytes(range(16)))
    found = data.load(f"folder:{root}").train.images[1]
    opaque = np.asarray(palette.convert("RGB")).astype(float)
    alpha = np.asarray(palette)[..., None] / 255  # entry k has the opacity k
    expected = alpha * opaque + (1 - alpha) * 255
    assert np.abs(found - expected).max() < 1.5


def test_sixteen_bit_grey_keeps_its_high_byte():
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    rgb = np.asarray(images.to_rgb(Image.fromarray(grey)))
    np.testing.assert_array_equal(rgb, np.repeat((grey >> 8)[..., None], 3, axis=-1))


def test_image_size_resizes_the_shorter_side_and_crops_the_centre(root):
    halves = np.zeros((20, 60, 3), np.uint8)
    halves[:, 20:40] = 200  # the central square
    for path in (root / "train").rglob("*.png"):
        write(path, halves)
    found = data.load(f"folder:{root}", image_size=10)
    assert found.train.images.shape == (6, 10, 10, 3)
    assert (found.train.images[:, :, 1:-1] == 200).all()
    assert found.test.images.shape == (2, 10, 10, 3)


def test_rectangles_of_one_size_keep_it(root):
    for path in root.rglob("*.png"):
        write(path, pixels(0, height=6, width=9))
    assert data.load(f"folder:{root}").train.images.shape[1:] == (6, 9, 3)


@pytest.mark.parametrize("files", ["train/cat/1.png", "test/*/*.png"])
def test_differing_sizes_name_two_files_both_sizes_and_the_field(root, files):
    changed = sorted(root.glob(files))
    for path in changed:
        write(path, pixels(0, height=7, width=5))
    text = failure(root)
    assert str(root / "train" / "bird" / "0.png") in text and str(changed[0]) in text
    assert "8x8" in text and "5x7" in text and "data.image_size" in text


def test_a_path_that_is_no_folder(root):
    assert "nowhere does not exist" in failure(root / "nowhere")
    assert "is not a folder" in failure(root / "train" / "cat" / "0.png")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["train"], ["train does not exist"]),
        (["test"], ["test does not exist"]),
        (["train/cat/0.png", "train/cat/1.png", "train/cat/2.png"], ["train/cat"]),
        (["train/bird", "train/cat"], ["train: no images in class folders"]),
        (["train/cat", "test/cat"], ["only one class, 'bird'"]),
        (["train/bird", "test/cat"], ["only in train/: cat", "only in test/: bird"]),
    ],
)
def test_what_is_missing_is_named(root, lost, words):
    for number, part in enumerate(lost):
        (root / part).rename(root / f"old{number}")
    text = failure(root)
    assert all(word in text for word in words), text


def test_many_differing_classes_stay_a_short_message(root):
    for k in range(200):
        write(root / "test" / f"extra{k:03d}" / "0.png", pixels(0))
    text = failure(root)
    assert "extra004 and 195 more" in text and len(text) < 600


@pytest.mark.parametrize("name", ["bird/0.png", "cat/2.png"])  # the first, the last
@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_an_undecodable_image_is_named(root, name, content):
    """Promise 31: by its path."""
    path = root / "train" / name
    path.write_bytes(path.read_bytes()[:60] if content == "cut" else content)
    assert str(path) in failure(root)


def test_more_files_than_one_task_are_all_read_in_order(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "_PATIENCE", -1.0)
    expected = np.stack([pixels(seed, 2, 2) for seed in range(300)])
    for index, array in enumerate(expected):
        write(tmp_path / f"{index:03d}.png", array)
    paths = sorted(str(path) for path in tmp_path.iterdir())
    found, good = images.decode_all(paths, paths.__getitem__, 0, "many")
    np.testing.assert_array_equal(found, expected)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["many: decoding images, 128 of 300"]
