"""Crops large images while decoding, as in the usual ImageNet recipe.

Training: a random part of the image, resized (Szegedy et al., arXiv 1409.4842, drawn as
by torchvision's RandomResizedCrop). Testing: the shorter side is resized and the centre
cropped. Mirroring is done in the compiled step.
"""

import math

import numpy as np
from PIL import Image

from lakd_jax.data import images

_RATIOS = (3 / 4, 4 / 3)  # width / height of a random crop
_TRIES = 10


def generator(seed: int, epoch: int, example: int) -> np.random.Generator:
    """Returns the generator of one view, which depends on the arguments alone."""
    key = np.array([seed % 2**32 << 32 | epoch % 2**32, example], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def random_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, ...]
) -> tuple[int, int, int, int]:
    """Draws a box with an area in `scale` and an aspect ratio of 3/4 to 4/3.

    Args:
      rng: draws up to four numbers per attempt, of which there are ten.
      width: of the image, in pixels.
      height: of the image, in pixels.
      scale: smallest and largest share of the area, in 0..1.

    Returns:
      (left, top, right, bottom) in pixels; if no attempt fits, the largest centred box
      with an allowed aspect ratio.
    """
    area = width * height
    low, high = (math.log(ratio) for ratio in _RATIOS)
    for _ in range(_TRIES):
        crop_area = area * rng.uniform(scale[0], scale[1])
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(crop_area * ratio)), round(math.sqrt(crop_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    w = min(width, round(height * _RATIOS[1]))
    h = min(height, round(width / _RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_view(
    source: str | bytes,
    name: str,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, ...],
    orient: bool = True,
) -> np.ndarray:
    """Decodes a random crop of an image to (size, size, 3) uint8; bilinear.

    JPEGs are decoded at a half, a quarter or an eighth of their size if the crop still
    has at least `size` pixels, which saves most of the work for large images.
    The crop is a part of the upright image; with `orient` False, of the stored one.

    Raises:
      DataError: the image cannot be decoded.
    """
    with images.open_image(source, name) as image:
        width, height = images.upright_size(image, orient)
        box = random_box(rng, width, height, scale)
        shortest = min(box[2] - box[0], box[3] - box[1])
        if shortest > size:  # a draft has the sides of the stored image, not turned
            least_width, least_height = (s * size // shortest + 1 for s in image.size)
            image.draft("RGB", (least_width, least_height))
        rgb = images.to_rgb(image, orient)
        x, y = rgb.width / width, rgb.height / height
        box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR, box))


def test_view(
    source: str | bytes, name: str, size: int, shorter: int, orient: bool = True
) -> np.ndarray:
    """Decodes the centre of an image to (size, size, 3) uint8.

    Args:
      source: path, or the encoded bytes.
      name: the image's name in error messages.
      size: height and width of the centre crop.
      shorter: length to which the shorter side is resized first (bilinear), at least
        `size`.
      orient: whether to turn the image as its EXIF tag says.

    Raises:
      DataError: the image cannot be decoded.
    """
    with images.open_image(source, name) as image:
        return centre(images.to_rgb(image, orient), size, shorter)


def centre(rgb: Image.Image, size: int, shorter: int) -> np.ndarray:
    """Resizes the shorter side (bilinear); returns the centre, (size, size, 3)."""
    width, height = rgb.size
    short = min(width, height)
    w, h = (int(shorter * side / short) for side in (width, height))
    resized = rgb.resize((w, h), Image.Resampling.BILINEAR)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
