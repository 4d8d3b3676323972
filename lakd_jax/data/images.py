"""Decodes image files to uint8 RGB arrays of one size."""

import concurrent.futures
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from lakd_jax import errors

_CHUNK = 128  # images per task: balances load between threads against overhead
_PATIENCE = 2.0  # seconds before progress is reported
# Limits the memory that a small file can demand; as RGB this is 192 MiB.
MAX_PIXELS = 2**26
# Some of Pillow's readers start other programs (EPS: Ghostscript); these do not.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")


def to_rgb(image: Image.Image, orient: bool = True) -> Image.Image:
    """Returns the image as 8-bit RGB; transparency is dropped."""
    if orient:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion clips
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.mode == "P":  # via RGBA, since a transparent palette causes a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


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


def decode(source: str | bytes, image_size: int, name: str) -> np.ndarray:
    """Decodes one image, given as its path or bytes, to (H, W, 3) uint8.

    Args:
      source: path, or the encoded bytes.
      image_size: height and width in pixels; 0 keeps the image's size.
      name: the image's name in error messages.

    Raises:
      DataError: the image cannot be decoded.
    """
    with open_image(source, name) as file:
        image = to_rgb(file)
    return np.asarray(resize(image, image_size) if image_size else image)


def decode_all(
    sources: Sequence[str | bytes],
    name: Callable[[int], str],
    image_size: int,
    split_name: str,
    max_bad: int = 0,
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

    Returns:
      (N, H, W, 3) uint8, and (N,) the positions of the decoded images in `sources`.

    Raises:
      DataError: more images cannot be decoded, or sizes differ and `image_size` is 0;
        with `max_bad` 0 the message names the first such image.
    """
    bad: dict[int, str] = {}

    def attempt(i: int) -> np.ndarray | None:
        try:
            return decode(sources[i], image_size, name(i))
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
