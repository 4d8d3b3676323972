"""Says which cells of test images are foreground: a central box, or masks."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from lakd_jax import data, errors
from lakd_jax.explain import points


@dataclasses.dataclass(frozen=True)
class Objects:
    """Test images, and where their objects are.

    Attributes:
        chosen: (N,) positions in the test split.
        masks: (N,) images in shades of grey, white on the object; None for the box.
    """

    chosen: np.ndarray
    masks: tuple[Image.Image, ...] | None = None

    def foreground(self, cells: int) -> np.ndarray:
        """Returns (N, cells, cells) bool: cells at least half of which are object."""
        if self.masks is None:
            box = points.central(cells)
            return np.broadcast_to(box, (len(self.chosen), cells, cells))
        size = (cells, cells)
        averaged = [mask.resize(size, Image.Resampling.BOX) for mask in self.masks]
        return np.stack([np.asarray(mask) >= 127.5 for mask in averaged])


def central(examples: int, count: int) -> Objects:
    """Returns up to `count` of the test images, drawn once for all runs."""
    order = np.random.default_rng(0).permutation(examples)
    return Objects(np.sort(order[:count]))


def of_masks(
    folder: Path, test: data.Split, count: int, sizes: Collection[int]
) -> Objects:
    """Returns the first `count` test images that have a mask in `folder`.

    A mask is a PNG file named after the image's class folder and file, or, for data
    without files, after its index in the test split of the source ("17.png"). It has
    the framing of the image that networks receive, at any size. What is not black is
    object. Images without a cell of object, or with nothing else, are passed over.

    Args:
        folder: of the masks.
        test: the test split.
        count: the most images to choose.
        sizes: cells per side of the grids that will be measured.

    Raises:
        errors.DataError: there are none.
    """
    chosen, masks = [], []
    for i in range(len(test)):
        path = folder / _name(test, i)
        if len(chosen) < count and path.is_file():
            mask = Image.open(path).convert("L").point(lambda value: 255 * (value > 0))
            one = Objects(np.array([i]), (mask,))
            grids = [one.foreground(size) for size in sizes]
            if all(grid.any() and not grid.all() for grid in grids):
                chosen.append(i)
                masks.append(mask)
    if not chosen:
        example = "CLASS/FILE.png" if test.names is not None else "17.png"
        raise errors.DataError(
            f"--masks {folder}: has no mask of a test image, named {example}, with "
            "both object and background."
        )
    return Objects(np.array(chosen), tuple(masks))


def _name(test: data.Split, i: int) -> Path:
    """Returns the name of the mask of a test image within the folder of masks."""
    if test.names is None:
        return Path(f"{test.ids[i]}.png")
    return Path(*Path(str(test.names[i])).parts[-2:]).with_suffix(".png")
