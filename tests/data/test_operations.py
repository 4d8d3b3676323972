"""Tests the operations of augmentation policies against Pillow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lakd_jax.data import operations

SIDE = (26, 21)  # width, height
FILL = (124, 116, 104)
VALUES = {
    "identity": (0.0,),
    "shear_x": (0.3, -0.99),
    "shear_y": (0.21, -0.57),
    "translate_x": (3.0, -2.4, 32.0),
    "translate_y": (2.0, -4.3),
    "rotate": (13.0, -30.0, 121.5),
    **dict.fromkeys(operations._BLENDS, (0.05, 0.4, 1.0, 1.9)),
    "posterize": (8.0, 5.0, 1.0, 0.0),
    "solarize": (256.0, 100.5, 0.0),
    "solarize_add": (0.0, 77.0),
    "invert": (0.0,),
    "autocontrast": (0.0,),
    "equalize": (0.0,),
}
CASES = [(name, value) for name, values in VALUES.items() for value in values]
EXACT = {"identity", "invert", "posterize", "solarize", "solarize_add", "equalize"}
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def images():
    """A picture with few tones, noise, and a picture of one colour: (3, H, W, 3)."""
    rng = np.random.default_rng(0)
    width, height = SIDE
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([40 + 9 * rows, 60 + 7 * columns, 90 + 3 * (rows + columns)], -1)
    noise = rng.integers(0, 256, (height, width, 3))
    return np.stack([ramp, noise, np.full_like(ramp, 77)]).astype(np.uint8)


def matrix(name, value):
    """Returns Pillow's six numbers of an affine transform."""
    return {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value),
    }[name]


def pillow(name, value, image, bicubic):
    """Returns what Pillow makes of an image (H, W, 3)."""
    image = Image.fromarray(image)
    how = {"resample": Image.BICUBIC if bicubic else Image.NEAREST, "fillcolor": FILL}
    if name == "rotate":
        found = image.rotate(value, **how)
    elif name in ("shear_x", "shear_y", "translate_x", "translate_y"):
        how_to = (image.size, Image.Transform.AFFINE, matrix(name, value))
        found = image.transform(*how_to, **how)
    elif name in ENHANCERS:
        found = ENHANCERS[name](image).enhance(value)
    elif name == "solarize_add":
        found = image.point(
            [min(i + int(value), 255) if i < 128 else i for i in range(256)] * 3
        )
    elif name == "posterize":
        if value == 0:  # black, in the versions of Pillow that do not refuse it
            return np.zeros_like(image)
        found = ImageOps.posterize(image, int(value))
    elif name == "solarize":
        found = ImageOps.solarize(image, value)
    else:
        plain = {
            "identity": lambda x: x,
            "invert": ImageOps.invert,
            "autocontrast": ImageOps.autocontrast,
            "equalize": ImageOps.equalize,
        }
        found = plain[name](image)
    return np.asarray(found)


@functools.cache
def ours(bicubic):
    """Returns the results of all cases (cases, 3, H, W, 3): one program for all."""
    apply = functools.partial(operations.apply, fill=FILL, bicubic=bicubic)
    every = jax.jit(jax.vmap(jax.vmap(apply, (0, None, None)), (None, 0, 0)))
    numbers = np.array([operations.OPERATIONS.index(name) for name, _ in CASES])
    values = np.array([value for _, value in CASES], np.float32)
    return jax.device_get(every(images(), numbers, values))


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_it_is_pillows(number, bicubic):
    name, value = CASES[number]
    found = ours(bicubic)[number]
    assert found.dtype == np.uint8
    expected = np.stack([pillow(name, value, x, bicubic) for x in images()])
    away = np.abs(found.astype(int) - expected.astype(int))
    if name in EXACT:
        np.testing.assert_array_equal(found, expected)
    elif name in operations._MOVES and not bicubic:
        # Pillow rounds coordinates to 2^-16: a tie may fall on the other side.
        assert np.mean(away.any(-1)) < 0.02
    else:  # where rounding makes a tone whole, or not
        assert away.max() <= 1
        assert np.mean(away > 0) < 0.02


def test_every_operation_has_a_case():
    assert tuple(VALUES) == operations.OPERATIONS


def test_each_changes_the_picture():
    """Or the comparison above would show nothing."""
    still = {(name, 1.0) for name in operations._BLENDS}
    still |= {("identity", 0.0), ("posterize", 8.0), ("solarize", 256.0)}
    still.add(("solarize_add", 0.0))
    for case, found in zip(CASES, ours(False), strict=True):
        assert (case in still) == np.array_equal(found[:2], images()[:2]), case


def test_luma_is_pillows():
    picture = images()[1]
    expected = np.asarray(Image.fromarray(picture).convert("L"))
    np.testing.assert_array_equal(
        operations.grey(jnp.asarray(picture))[..., 0], expected
    )
