"""The built-in data set: scikit-learn's 1,797 scans of handwritten digits.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
UCI Machine Learning Repository, 1998 (its test part), 8x8 pixels of 17 greys.
"""

from typing import Any

import numpy as np
from PIL import Image

from lakd_jax.data import dataset

DEFAULT_SIZE = 16
_TEST_EXAMPLES = 360


def load(image_size: int) -> dataset.Dataset:
    """Returns 1,437 training and 360 test images, the same every time.

    Args:
      image_size: height and width in pixels, resized bilinearly; 0 means 16.
    """
    from sklearn import datasets

    scans: Any = datasets.load_digits()
    size = image_size or DEFAULT_SIZE
    images = np.stack([_enlarge(scan, size) for scan in scans.images])
    everything = dataset.new_split(images, scans.target)
    in_test = dataset.stratified_mask(scans.target, _TEST_EXAMPLES)
    classes = tuple(str(name) for name in scans.target_names)
    parts = (everything.take(mask) for mask in (~in_test, in_test))
    train, test = (dataset.new_split(part.images, part.labels) for part in parts)
    return dataset.Dataset("digits", classes, train, None, test)


def _enlarge(scan: np.ndarray, size: int) -> np.ndarray:
    """Converts (8, 8) grey values of 0 to 16 to (size, size, 3) uint8."""
    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    grey = grey.resize((size, size), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
