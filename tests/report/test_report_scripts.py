"""Class names in any script are drawn without warnings."""

import warnings

import numpy as np
import pytest
from PIL import Image

from lakd_jax.report import canvas, grids, pictures

NAMES = ["日本", "кот", "قط", "$100 & $5", "a|b", "<b>x", "𓃠"]


@pytest.mark.filterwarnings("error")
def test_names_in_any_script(tmp_path):
    matrix = np.eye(len(NAMES))
    pictures.confusion(tmp_path / "confusion.png", matrix.astype(int), NAMES)
    grids.tree(tmp_path / "tree.png", [[(name, None, 0.5) for name in NAMES]])
    series = {name: [(0.0, 1.0), (1.0, k)] for k, name in enumerate(NAMES)}
    pictures.lines(tmp_path / "lines.png", series, label="x")
    for name in ("confusion.png", "tree.png", "lines.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image).std() > 1  # not empty


def test_only_drawing_is_quiet():
    figure = canvas.new_figure(50, 50)
    with pytest.warns(UserWarning, match="Glyph .* missing"):
        warnings.simplefilter("always")
        width = canvas.text_width(figure, NAMES[-1])
    assert width > 0
