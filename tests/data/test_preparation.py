"""Images of any size become what a network was tested with, from any source."""

import numpy as np
import pytest
from PIL import Image

from lakd_jax import errors
from lakd_jax.data import images, preparation
from lakd_jax.data.streaming import crops


@pytest.fixture
def photo(tmp_path):
    """An oblong photo of random pixels, as a path."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 30, 3)).astype(np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_files_images_and_arrays_become_what_the_data_reader_makes(photo):
    prepare = preparation.Preparation(8, 8)
    expected = images.decode(str(photo), 8, "photo")
    with Image.open(photo) as opened:
        given = [photo, str(photo), opened, np.asarray(opened)]
        for picture in given:
            np.testing.assert_array_equal(prepare(picture), expected)
        np.testing.assert_array_equal(prepare.all(given), [expected] * 4)


def test_streamed_runs_resize_the_shorter_side_first(photo):
    prepare = preparation.Preparation(8, 8, shorter=10)
    expected = crops.test_view(str(photo), "photo", 8, 10)
    np.testing.assert_array_equal(prepare(photo), expected)
    assert np.any(expected != preparation.Preparation(8, 8)(photo))


def test_arrays_of_the_right_size_are_not_touched():
    array = np.random.default_rng(1).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    assert preparation.Preparation(4, 6).all(array) is array
    assert preparation.Preparation(3, 3).all(array).shape == (2, 3, 3, 3)
    assert preparation.Preparation(4, 6).all([]).shape == (0, 4, 6, 3)


def test_photos_are_turned_unless_the_run_did_not(photo):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = photo.with_name("turned.png")
    Image.open(photo).transpose(Image.Transpose.ROTATE_180).save(turned, exif=exif)
    upright = preparation.Preparation(8, 8)
    np.testing.assert_array_equal(upright(turned), upright(photo))
    as_stored = preparation.Preparation(8, 8, orientation=False)
    np.testing.assert_array_equal(as_stored(turned), upright(photo)[::-1, ::-1])


def test_what_is_no_picture_is_refused(tmp_path):
    prepare = preparation.Preparation(4, 4)
    with pytest.raises(ValueError, match=r"uint8 of shape \(N, H, W, 3\).*float64"):
        prepare.all(np.zeros((1, 4, 4, 3)))
    with pytest.raises(TypeError, match="not int"):
        prepare.all([3])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(errors.DataError, match="text.png: not a readable image"):
        prepare(tmp_path / "text.png")


@pytest.mark.parametrize(
    "steps, words",
    [
        (dict(shorter=10), "shorter side resized (bilinear) to 10, then the centre"),
        (dict(orientation=False), "the largest centred part"),
    ],
)
def test_it_is_described(steps, words):
    text = preparation.Preparation(4, 6, **steps).describe()
    assert words in text and "4 pixels high and 6 wide" in text
    assert ("EXIF" in text) == ("orientation" not in steps)
