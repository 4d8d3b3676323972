"""Draws attention maps: where teacher and student respond in each module."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lakd_jax.report import canvas

WRONG = "#b3400a"  # vermillion, darkened to a contrast of at least 4.5:1 on white


@dataclasses.dataclass(frozen=True)
class Caption:
    """Class names for one image: the true class and the two predictions."""

    truth: str
    teacher: str
    student: str


@dataclasses.dataclass(frozen=True)
class ModuleMaps:
    """Maps of one module, (N, h, w) each; `mask` is None if the method has none."""

    name: str
    teacher: np.ndarray
    mask: np.ndarray | None
    student: np.ndarray

    def columns(self) -> list[tuple[str, np.ndarray]]:
        """Returns (title, maps) for each column of this module."""
        shown = [("teacher", self.teacher), ("mask", self.mask)]
        shown.append(("student", self.student))
        return [(title, maps) for title, maps in shown if maps is not None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Computes where the tiles go, in pixels from the upper left corner.

    Attributes:
      images: number of rows.
      groups: number of columns per module.
    """

    images: int
    groups: tuple[int, ...]

    left = 290  # margin of the captions
    right = 30
    top = 92
    bottom = 96
    gap = 6  # between tiles
    group_gap = 26  # between modules

    @property
    def tile(self) -> int:
        """Returns the side of a tile; it shrinks as the number of columns grows."""
        return max(84, min(150, 2200 // (1 + sum(self.groups)) // 6 * 6))

    def x(self, column: int) -> int:
        """Returns the left edge of a column; 0 is the image, modules follow."""
        starts = np.cumsum((1, *self.groups))
        groups_before = int(np.searchsorted(starts, column, side="right"))
        separators = groups_before * (self.group_gap - self.gap)
        return self.left + column * (self.tile + self.gap) + separators

    def y(self, row: int) -> int:
        """Returns the upper edge of a row."""
        return self.top + row * (self.tile + self.gap)

    @property
    def size(self) -> tuple[int, int]:
        """Returns the width and height of the picture."""
        width = self.x(sum(self.groups)) + self.tile + self.right
        return width, self.y(self.images - 1) + self.tile + self.bottom


@canvas.any_script()
def attention(
    path: canvas.Path,
    images: np.ndarray,
    rows: Sequence[Caption],
    modules: Sequence[ModuleMaps],
) -> None:
    """Draws, for each image, where teacher and student respond in each module.

    Columns: the image, then for every module the teacher's map, the mask and the
    student's map. The colour scale of each map runs from its lowest to its highest
    value, so places are comparable between maps, magnitudes are not. Wrong
    predictions are bold, coloured and marked with a cross.

    Args:
      path: image file to write; the suffix selects the format.
      images: (N, H, W, 3) uint8, N >= 1.
      rows: one caption per image.
      modules: at least one; maps (N, h, w) of any size.

    Raises:
      ValueError: the lengths disagree.
    """
    lengths = {len(images), len(rows)}
    lengths |= {len(maps) for module in modules for _, maps in module.columns()}
    if len(lengths) > 1 or not len(images) or not modules:
        raise ValueError(
            f"images, rows and maps must have one length, at least 1; got {lengths}"
        )
    page = _Page(Layout(len(images), tuple(len(m.columns()) for m in modules)))
    page.titles(modules)
    for row, (image, caption) in enumerate(zip(images, rows, strict=True)):
        page.caption(row, caption)
        page.tile(row, 0, image)
        columns = [maps for module in modules for _, maps in module.columns()]
        for column, maps in enumerate(columns, start=1):
            page.tile(row, column, _coloured(_unit_range(maps[row])))
    page.colour_bar()
    page.save(path)


class _Page:
    """Draws tiles into a pixel array, and text on top of it."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._width, self._height = layout.size
        self._figure = canvas.new_figure(self._width, self._height)
        self._pixels = np.full((self._height, self._width, 3), 255, np.uint8)
        self._small = 8.0 if layout.tile >= 120 else 7.0

    def save(self, path: canvas.Path) -> None:
        self._figure.figimage(self._pixels)
        canvas.save(self._figure, path)

    def _text(
        self, x: float, y: float, text: str, limit: float = math.inf, **overrides: Any
    ) -> None:
        style = {
            "fontsize": 8,
            "color": canvas.INK,
            "va": "center",
            "parse_math": False,
        }
        style |= overrides
        length = len(text)
        while length > 1 and canvas.text_width(self._figure, text, **style) > limit:
            length -= 1
            text = canvas.cut(text, length)
        self._figure.text(x / self._width, 1 - y / self._height, text, **style)

    def titles(self, modules: Sequence[ModuleMaps]) -> None:
        """Writes the name of each module, and of each of its columns."""
        layout, column = self._layout, 1
        middle = layout.x(0) + layout.tile / 2
        self._text(middle, layout.top - 16, "image", ha="center", fontsize=self._small)
        for module in modules:
            titles = [title for title, _ in module.columns()]
            first, last = layout.x(column), layout.x(column + len(titles) - 1)
            width = last + layout.tile - first
            size = 9.5 if layout.tile >= 120 else 8.0
            style = {"ha": "center", "fontsize": size, "weight": "bold"}
            self._text(first + width / 2, 30, module.name, limit=width, **style)
            self._pixels[50:52, first : first + width] = 187  # a grey rule
            for title in titles:
                middle = layout.x(column) + layout.tile / 2
                style = {"ha": "center", "fontsize": self._small}
                self._text(middle, layout.top - 16, title, **style)
                column += 1

    def tile(self, row: int, column: int, picture: np.ndarray) -> None:
        """Draws a picture (H, W, 3) uint8, enlarged to the tile at this place."""
        layout = self._layout
        y, x, side = layout.y(row), layout.x(column), layout.tile
        self._pixels[y : y + side, x : x + side] = _nearest(picture, side, side)

    def caption(self, row: int, caption: Caption) -> None:
        """Writes the true class and both networks' answers to the left of a row."""
        lines = [("true", caption.truth), ("teacher", caption.teacher)]
        lines.append(("student", caption.student))
        middle = self._layout.y(row) + self._layout.tile / 2
        for index, (who, name) in enumerate(lines):
            y = middle + (index - 1) * 25
            self._text(86, y, who, ha="right", color=canvas.FAINT, fontsize=7.5)
            wrong = name != caption.truth
            style = {"color": WRONG, "weight": "bold"} if wrong else {}
            mark = "\N{BALLOT X} " if wrong else ""
            self._text(98, y, mark + name, limit=self._layout.left - 110, **style)

    def colour_bar(self) -> None:
        """Draws the scale of the maps below the tiles."""
        # Two tiles wide: every module has at least two columns.
        left, width = self._layout.x(1), 2 * self._layout.tile + self._layout.gap
        y = self._height - self._layout.bottom + 36
        ramp = _coloured(np.linspace(0, 1, width, dtype=np.float32)[None, :])
        self._pixels[y : y + 12, left : left + width] = ramp
        style = {"fontsize": 7.5, "color": canvas.FAINT}
        self._text(left - 14, y + 6, "value within each map", ha="right", **style)
        self._text(left, y + 28, "lowest", **style)
        self._text(left + width, y + 28, "highest", ha="right", **style)


def _nearest(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * picture.shape[0] // height
    return picture[rows][:, np.arange(width) * picture.shape[1] // width]


def _coloured(values: np.ndarray) -> np.ndarray:
    """Returns (h, w, 3) uint8 for values (h, w) in [0, 1]."""
    import matplotlib

    return matplotlib.colormaps["viridis"](values, bytes=True)[..., :3]


def _unit_range(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    low, high = float(np.min(values)), float(np.max(values))
    span = high - low
    usable = math.isfinite(span) and span > 0
    return (values - low) / span if usable else np.zeros_like(values)
