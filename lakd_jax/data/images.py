"""Decoding image files to uint8 RGB arrays of one size."""

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

_CHUNK = 128  # images a task: small enough to share out, large enough to be cheap
_PATIENCE = 2.0  # seconds of silence
# A small file may claim to be huge; as RGB this is 192 MiB.
MAX_PIXELS = 2**26
# Of Pillow's readers some start other programs (EPS: Ghostscript). These do not.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image as 8-bit RGB; transparency is dropped."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA, or a transparent palette warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` pixels (bilinear), crops the centre."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


@contextlib.contextmanager
def opened(source: str | bytes, name: str) -> Iterator[Image.Image]:
    """An encoded image, given as its path or its bytes, whose pixels are not read yet.

    Raises:
      DataError: it cannot be decoded, which may show only when the pixels are read.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known before it is decoded
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            yield image
    except Exception as error:  # Pillow's codecs raise a dozen different types
        raise errors.DataError(
            f"{name}: not a readable image ({error}). Delete or replace it."
        ) from error


def decode(source: str | bytes, image_size: int, name: str) -> np.ndarray:
    """Decodes one file, given as its path or its bytes, to (H, W, 3) uint8.

    Args:
      source: path, or the encoded bytes.
      image_size: height and width wanted in pixels; 0 keeps the image's own.
      name: what an error calls this image.

    Raises:
      DataError: the image cannot be decoded.
    """
    with opened(source, name) as file:
        image = to_rgb(file)
    return np.asarray(resize(image, image_size) if image_size else image)


def decode_all(
    sources: Sequence[str | bytes],
    name: Callable[[int], str],
    image_size: int,
    what: str,
    max_bad: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes many files in threads into one array.

    Args:
      sources: paths or encoded bytes, at least one.
      name: what an error calls the image at a position.
      image_size: as for `decode`.
      what: the data set's name for the one line on stderr after two seconds.

      max_bad: how many that cannot be decoded may be left out; a line on stderr then
        says how many were.

    Returns:
      (N, H, W, 3) uint8, and (N,) the positions in `sources` of those decoded.

    Raises:
      DataError: more cannot be decoded, or sizes differ and `image_size` is 0; with
        `max_bad` 0 the first such image in order is named.
    """
    bad: dict[int, str] = {}

    def attempt(i: int) -> np.ndarray | None:
        try:
            return decode(sources[i], image_size, name(i))
        except errors.DataError as error:
            bad[i] = str(error)
            if len(bad) > max_bad:
                raise _too_many(error, what, max_bad) from error
            return None

    first, number = None, -1
    while first is None:
        number += 1
        if number == len(sources):
            raise errors.DataError(f"{what}: no image can be decoded. {bad[0]}")
        first = attempt(number)
    images = np.empty((len(sources), *first.shape), np.uint8)

    def fill(start: int) -> int:
        stop = min(start + _CHUNK, len(sources))
        for i in range(max(start, number), stop):
            array = attempt(i)
            if array is None:
                continue
            if array.shape != first.shape:
                raise _sizes_differ(name(number), first, name(i), array)
            images[i] = array
        return stop

    # More threads only quarrel over the interpreter when images are small.
    pool = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        starts = range(0, len(sources), _CHUNK)
        _announce(pool.map(fill, starts), len(sources), what)
    finally:
        pool.shutdown(cancel_futures=True)
    good = np.setdiff1d(np.arange(len(sources)), list(bad))
    if bad:
        print(
            f"{what}: {len(bad)} of {len(sources)} images left out (data.max_bad="
            f"{max_bad}), such as {bad[min(bad)]}",
            file=sys.stderr,
        )
    return images[good] if bad else images, good


def _too_many(error: errors.DataError, what: str, max_bad: int) -> errors.DataError:
    if not max_bad:
        return error
    return errors.DataError(
        f"{error}\n{what}: more images than data.max_bad={max_bad} allows cannot be "
        "decoded."
    )


def _announce(done: Iterator[int], total: int, what: str) -> None:
    """Waits for all of `done`; says how far it is once, if that takes long."""
    begin, said = time.monotonic(), False
    for count in done:
        if not said and time.monotonic() - begin > _PATIENCE:
            said = True
            print(f"{what}: decoding images, {count:,} of {total:,}", file=sys.stderr)


def _sizes_differ(
    name_a: str, a: np.ndarray, name_b: str, b: np.ndarray
) -> errors.DataError:
    return errors.DataError(
        "images differ in size (width x height):\n"
        f"  {a.shape[1]}x{a.shape[0]}  {name_a}\n"
        f"  {b.shape[1]}x{b.shape[0]}  {name_b}\n"
        "Set data.image_size to resize and crop all of them."
    )
