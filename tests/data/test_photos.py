"""Photos as cameras and programs write them: turned, transparent, with 16 bits."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from lakd_jax import data, errors
from lakd_jax.data import images
from lakd_jax.data.streaming import batches, crops


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture in which no two corners are alike, so that JPEG keeps it."""
    y, x = np.mgrid[:height, :width]
    planes = (255 * x // width, 255 * y // height, 90 + 60 * (x > y))
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, tag: int, kind: str = "PNG", **options) -> bytes:
    """The file of a camera that was held so that EXIF's tag is `tag`."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    method = back.get(tag, images._TURNS.get(tag))
    stored = image if method is None else image.transpose(method)
    return encoded(stored, kind, exif=exif, **options)


def decoded(source: bytes, **options) -> np.ndarray:
    return images.decode(source, 0, "x", **options)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_photos_are_upright(kind, tag):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    found = decoded(turned(scene(), tag, kind, **lossless))
    np.testing.assert_array_equal(found, np.asarray(scene()))


def test_orientation_can_be_switched_off():
    found = decoded(turned(scene(), 6), orient=False)
    np.testing.assert_array_equal(found, np.rot90(np.asarray(scene())))


def test_a_damaged_exif_tag_leaves_the_photo_as_it_is():
    source = encoded(scene(), "JPEG", exif=b"Exif\0\0no header")
    np.testing.assert_array_equal(
        decoded(source), np.asarray(Image.open(io.BytesIO(source)).convert("RGB"))
    )


@pytest.mark.parametrize("tag", [1, 3, 6, 7])
def test_crops_are_parts_of_the_upright_photo(tag):
    """Also where the JPEG is decoded at a fraction of its size, before it is turned."""
    large = scene(480, 320)
    source = turned(large, tag, "JPEG", quality=98)
    box = crops.random_box(crops.generator(0, 0, 3), 480, 320, (0.5, 1.0))
    view = crops.train_view(source, "x", crops.generator(0, 0, 3), 24, (0.5, 1.0))
    expected = large.resize((24, 24), Image.Resampling.BILINEAR, box)
    assert np.abs(view.astype(int) - np.asarray(expected)).max() < 20
    assert np.abs(view.astype(int) - np.asarray(expected)).mean() < 2
    view = crops.test_view(source, "x", 24, 30)
    expected = ImageOps.fit(large.resize((45, 30), Image.Resampling.BILINEAR), (24, 24))
    assert np.abs(view.astype(int) - np.asarray(expected)).mean() < 8


@pytest.mark.parametrize("orientation", [True, False])
def test_the_field_reaches_both_kinds_of_reading(orientation, tmp_path):
    for role in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / role / name).mkdir(parents=True)
            photo = turned(scene(20, 20), 3, "PNG")
            (tmp_path / role / name / "x.png").write_bytes(photo)
    expected = np.asarray(scene(20, 20))
    expected = expected if orientation else expected[::-1, ::-1]
    source = f"folder:{tmp_path}"
    found = data.load(source, orientation=orientation)
    np.testing.assert_array_equal(found.train.images[0], expected)
    views = batches.Views(20, (1.0, 1.0), 20, orientation)
    stream = batches.load(source, views, minival=0, data_dir="", workers=0)
    np.testing.assert_array_equal(stream.test.take([0]).images[0], expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode):
    grey = Image.fromarray(np.full((8, 8), 40, np.uint8))
    if mode == "P":
        source = encoded(grey.convert("P"), transparency=40)
    else:
        alpha = Image.fromarray(np.repeat(np.uint8([[0, 51, 204, 255]]), 8, 0))
        image = grey.convert("L").resize((4, 8))
        bands = [image] * (3 if mode == "RGBA" else 1)
        source = encoded(Image.merge(mode, [*bands, alpha]))
    found = decoded(source)
    assert images.BACKGROUND == (255, 255, 255)
    assert (found[:, 0] == 255).all()
    if mode != "P":
        assert found[0, :, 0].tolist() == [255, 212, 83, 40]


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_grey_is_scaled_by_the_bits_it_uses(bits):
    ramp = np.linspace(0, 2**bits - 1, 256).astype(np.uint16).reshape(16, 16)
    found = decoded(encoded(Image.fromarray(ramp)))
    expected = np.repeat((ramp >> (bits - 8))[..., None], 3, -1)
    np.testing.assert_array_equal(found, expected)
    assert found.min() == 0 and found.max() == 255


@pytest.mark.parametrize("values", [[-5, 900], [0.0, 1.0]])
def test_grey_of_no_known_range_is_refused(values):
    dtype = np.int32 if isinstance(values[0], int) else np.float32
    image = Image.fromarray(np.array([values] * 2, dtype))
    with pytest.raises(errors.DataError, match="save the image with 8 bits"):
        decoded(encoded(image, "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "MPO"])
def test_the_content_decides_the_format(kind, tmp_path):
    more = {"save_all": True, "append_images": [scene()]} if kind == "MPO" else {}
    path = tmp_path / "called.jpg"
    path.write_bytes(encoded(scene(), kind, **more))
    found = images.decode(str(path), 0, "x").astype(int)
    assert found.shape == (32, 48, 3)
    assert np.abs(found - np.asarray(scene())).mean() < 20
