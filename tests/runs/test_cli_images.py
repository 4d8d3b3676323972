"""Image folders that cannot be used are refused before anything is trained."""

import commands
import numpy as np
import pytest
from PIL import Image

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def image_folder(root, classes=("cat", "dog"), count=40):
    for role in ("train", "test"):
        for k, name in enumerate(classes):
            folder = root / role / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((8, 8, 3), 100 * k + i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def break_nothing(root):
    return [str(root / "elsewhere")], root / "elsewhere"


def break_class(root):
    for file in (root / "train" / "dog").iterdir():
        file.unlink()
    return [str(root / "train" / "dog"), "no images"], root


def break_count(root):
    for role in ("train", "test"):
        (root / role / "dog").rename(root / f"{role} dog")
    return ["only one class, 'cat'"], root


def break_image(root):
    (root / "test" / "dog" / "3.png").write_bytes(b"\x89PNG but no more")
    return [str(root / "test" / "dog" / "3.png"), "not a readable image"], root


def break_size(root):
    file = root / "train" / "cat" / "7.png"
    Image.new("RGB", (9, 8)).save(file)
    return [str(file), "9x8", "data.image_size"], root


def break_batch(root):
    for role in ("train", "test"):
        for file in (root / role).glob("*/[1-9]*.png"):
            file.unlink()
    return ["2 training images do not fill one batch"], root


@pytest.mark.parametrize(
    "fault",
    [break_nothing, break_class, break_count, break_image, break_size, break_batch],
)
def test_fault_in_the_images(main, fault, tmp_path):
    words, folder = fault(image_folder(tmp_path / "images"))
    run = tmp_path / "run"
    args = (f"--config.data.source=folder:{folder}", "--config.data.image_size=0")
    args = (*args, "--config.data.minival=0", "--config.batch_size=16")
    commands.assert_refused(main(commands.DIGITS, *args, f"--workdir={run}"), *words)
    assert commands.untouched(run)
