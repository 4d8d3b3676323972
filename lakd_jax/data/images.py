"""Decodes image files to uint8 RGB arrays of one size."""

import concurrent.futures
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lakd_jax import errors

_CHUNK = 128  # images per task: balances load between threads against overhead
_PATIENCE = 2.0  # seconds before progress is reported
# Limits the memory that a small file can demand; as RGB this is 192 MiB.
MAX_PIXELS = 2**26
# Some of Pillow's readers start other programs (EPS: Ghostscript); these do not.
# Phones' JPEG files of several pictures (MPO) are read by JPEG's: the first picture.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
BACKGROUND = (255, 255, 255)  # what transparent pixels show: white
_TURNS = {  # how to show what a camera stored, by its EXIF tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, orient: bool = True) -> Image.Image:
    """Returns the image as 8-bit RGB, upright and without transparency.

    Transparent pixels show `BACKGROUND` as far as they are transparent. Grey of 16 bits
    is scaled by the range that the image uses: 0 to 2**bits - 1, with the fewest bits,
    at least 8, that hold its brightest pixel, as cameras and scanners store 10, 12 or
    14 bits in 16.

    Args:
      image: in any mode of Pillow.
      orient: whether to turn the image as its EXIF tag says. Pillow itself turns TIFF
        files, always.

    Raises:
      ValueError: grey values are negative or fractions, of which no range is known.
    """
    image.load()
    turn = _TURNS.get(_orientation(image)) if orient else None
    if turn is not None:  # it may be 0
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def upright_size(image: Image.Image, orient: bool = True) -> tuple[int, int]:
    """Returns (width, height) of what `to_rgb` returns, without reading the pixels."""
    width, height = image.size
    turned = orient and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, that is left to be applied."""
    if image.format == "TIFF":  # turned by Pillow when it reads the pixels
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag; viewers show such images as they are stored
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey of more than 8 bits, see `to_rgb`; Pillow's conversion clips it."""
    grey = np.asarray(image)
    if grey.dtype.kind == "f" or grey.min() < 0:
        raise ValueError(
            f"grey values from {grey.min():g} to {grey.max():g} of type {grey.dtype}: "
            "save the image with 8 bits"
        )
    excess = max(int(grey.max()).bit_length() - 8, 0)
    return Image.fromarray((grey >> excess).astype(np.uint8))


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` pixels (bilinear) and crops the centre."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


@contextlib.contextmanager
def open_image(source: str | bytes, name: str) -> Iterator[Image.Image]:
    """Opens an encoded image, given as its path or bytes, without reading its pixels.

    Raises:
      DataError: it cannot be decoded; possibly only when its pixels are read.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known before decoding
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            yield image
    except Exception as error:  # Pillow's codecs raise a dozen different types
        raise errors.DataError(
            f"{name}: not a readable image ({error}). Delete or replace it."
        ) from error


def decode(
    source: str | bytes, image_size: int, name: str, orient: bool = True
) -> np.ndarray:
    """Decodes one image, given as its path or bytes, to (H, W, 3) uint8.

    Args:
      source: path, or the encoded bytes.
      image_size: height and width in pixels; 0 keeps the image's size.
      name: the image's name in error messages.
      orient: whether to turn it as its EXIF tag says.

    Raises:
      DataError: the image cannot be decoded.
    """
    with open_image(source, name) as file:
        image = to_rgb(file, orient)
    return np.asarray(resize(image, image_size) if image_size else image)


def decode_all(
    sources: Sequence[str | bytes],
    name: Callable[[int], str],
    image_size: int,
    split_name: str,
    max_bad: int = 0,
    orient: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes many images in threads into one array.

    Args:
      sources: paths or encoded bytes, at least one.
      name: maps a position in `sources` to the image's name in error messages.
      image_size: as for `decode`.
      split_name: the split's name in messages; progress is reported on stderr once,
        after two seconds.
      max_bad: how many undecodable images may be skipped; a line on stderr reports
        their number.
      orient: as for `decode`.

    Returns:
      (N, H, W, 3) uint8, and (N,) the positions of the decoded images in `sources`.

    Raises:
      DataError: more images cannot be decoded, or sizes differ and `image_size` is 0;
        with `max_bad` 0 the message names the first such image.
    """
    bad: dict[int, str] = {}

    def attempt(i: int) -> np.ndarray | None:
        try:
            return decode(sources[i], image_size, name(i), orient)
        except errors.DataError as error:
            bad[i] = str(error)
            if len(bad) > max_bad:
                raise _too_many(error, split_name, max_bad) from error
            return None

    first, first_index = None, -1
    while first is None:
        first_index += 1
        if first_index == len(sources):
            raise errors.DataError(f"{split_name}: no image can be decoded. {bad[0]}")
        first = attempt(first_index)
    images = np.empty((len(sources), *first.shape), np.uint8)

    def fill(start: int) -> int:
        stop = min(start + _CHUNK, len(sources))
        for i in range(max(start, first_index), stop):
            array = attempt(i)
            if array is None:
                continue
            if array.shape != first.shape:
                raise _sizes_differ(name(first_index), first, name(i), array)
            images[i] = array
        return stop

    # With small images, more threads only contend for the interpreter lock.
    pool = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        starts = range(0, len(sources), _CHUNK)
        _wait(pool.map(fill, starts), len(sources), split_name)
    finally:
        pool.shutdown(cancel_futures=True)
    good = np.setdiff1d(np.arange(len(sources)), list(bad))
    if bad:
        print(
            f"{split_name}: {len(bad)} of {len(sources)} images left out (data.max_bad="
            f"{max_bad}), such as {bad[min(bad)]}",
            file=sys.stderr,
        )
    return images[good] if bad else images, good


def _too_many(
    error: errors.DataError, split_name: str, max_bad: int
) -> errors.DataError:
    if not max_bad:
        return error
    return errors.DataError(
        f"{error}\n{split_name}: more images than data.max_bad={max_bad} allows "
        "cannot be decoded."
    )


def _wait(done: Iterator[int], total: int, split_name: str) -> None:
    """Waits for all of `done`, and reports progress once if that takes long."""
    begin, reported = time.monotonic(), False
    for count in done:
        if not reported and time.monotonic() - begin > _PATIENCE:
            reported = True
            print(
                f"{split_name}: decoding images, {count:,} of {total:,}",
                file=sys.stderr,
            )


def _sizes_differ(
    name_a: str, a: np.ndarray, name_b: str, b: np.ndarray
) -> errors.DataError:
    return errors.DataError(
        "images differ in size (width x height):\n"
        f"  {a.shape[1]}x{a.shape[0]}  {name_a}\n"
        f"  {b.shape[1]}x{b.shape[0]}  {name_b}\n"
        "Set data.image_size to resize and crop all of them."
    )
