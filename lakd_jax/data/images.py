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
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source
        ) as image:
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
) -> np.ndarray:
    """Decodes many files in threads into one (N, H, W, 3) uint8 array.

    Args:
      sources: paths or encoded bytes, at least one.
      name: what an error calls the image at a position.
      image_size: as for `decode`.
      what: the data set's name for the one line on stderr after two seconds.

    Raises:
      DataError: an image cannot be decoded, or sizes differ and `image_size`
        is 0; the first such image in order is named.
    """
    first = decode(sources[0], image_size, name(0))
    images = np.empty((len(sources), *first.shape), np.uint8)

    def fill(start: int) -> int:
        stop = min(start + _CHUNK, len(sources))
        for i in range(start, stop):
            array = decode(sources[i], image_size, name(i))
            if array.shape != first.shape:
                raise _sizes_differ(name(0), first, name(i), array)
            images[i] = array
        return stop

    # More threads only quarrel over the interpreter when images are small.
    pool = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        starts = range(0, len(sources), _CHUNK)
        _announce(pool.map(fill, starts), len(sources), what)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


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
