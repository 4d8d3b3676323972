"""How an image of any size becomes the array that a network was tested with."""

import dataclasses
import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageOps

from lakd_jax.data import images
from lakd_jax.data.streaming import crops

# A path, an open image, or an RGB array (H, W, 3) uint8.
Picture = str | os.PathLike | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The resizing and cropping of a run's test images, before the network's own.

    Attributes:
      height, width: of the result, in pixels.
      shorter: length to which the shorter side is resized before the centre of
        `height` x `width` is cut out; 0: the largest centred part of that shape is
        resized.
      orientation: whether photos are turned as their EXIF tag says.
    """

    height: int
    width: int
    shorter: int = 0
    orientation: bool = True

    def __call__(self, picture: Picture) -> np.ndarray:
        """Returns an image as (height, width, 3) uint8; one of that size as it is.

        Raises:
          DataError: a file cannot be decoded.
          TypeError: it is no picture.
        """
        if isinstance(picture, np.ndarray):
            _require_rgb(picture.shape, picture.dtype)
            return self._fitted(Image.fromarray(picture))
        if isinstance(picture, Image.Image):
            return self._fitted(images.to_rgb(picture, self.orientation))
        if not isinstance(picture, str | os.PathLike):
            kind = type(picture).__name__
            raise TypeError(f"a picture is a path, a PIL image or an array, not {kind}")
        name = os.path.expanduser(picture)
        with images.open_image(name, name) as file:
            return self._fitted(images.to_rgb(file, self.orientation))

    def all(self, pictures: np.ndarray | Iterable[Picture]) -> np.ndarray:
        """Returns pictures, which may differ in size, as (N, height, width, 3) uint8.

        Raises:
          DataError: a file cannot be decoded.
          TypeError: one is no picture, or not uint8 RGB.
        """
        if isinstance(pictures, np.ndarray):
            _require_rgb(pictures.shape[1:], pictures.dtype)
            if pictures.shape[1:3] == (self.height, self.width):
                return pictures
        prepared = [self(picture) for picture in pictures]
        shape = (len(prepared), self.height, self.width, 3)
        return np.array(prepared, np.uint8).reshape(shape)

    def _fitted(self, image: Image.Image) -> np.ndarray:
        size = (self.width, self.height)
        if self.shorter:
            return crops.centre(image, self.width, self.shorter)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return np.asarray(image)

    def describe(self) -> str:
        """Returns the preparation in words."""
        turned = "turned as the EXIF tag says, " if self.orientation else ""
        size = f"{self.height} pixels high and {self.width} wide"
        if self.shorter:
            steps = f"the shorter side resized (bilinear) to {self.shorter}"
            return f"{turned}{steps}, then the centre cut out, {size}"
        return f"{turned}the largest centred part resized (bilinear) to be {size}"


def _require_rgb(shape: Sequence[int], dtype: np.dtype) -> None:
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise ValueError(
            "images must be uint8 of shape (N, H, W, 3), or a list of paths, PIL "
            f"images and arrays (H, W, 3); an image here is {dtype} of {tuple(shape)}"
        )
