"""Shared by all pictures: figures sized in pixels, text measurement, ink colours.

Uses matplotlib's objects rather than pyplot: no global state, no display.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

from lakd_jax import paths
from lakd_jax.store import bucket

# Fonts of systems and distributions with signs that matplotlib's own lacks.
_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Source Han Sans")
_FONTS += ("IPAGothic", "WenQuanYi Zen Hei", "Hiragino Sans", "PingFang SC")
_FONTS += ("Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Arabic")

DPI = 150
INK = "#222222"
FAINT = "#767676"

Path = str | os.PathLike[str]


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG."""
    if not paths.is_bucket(path):
        figure.savefig(path, dpi=DPI)
        return
    data = io.BytesIO()
    figure.savefig(data, dpi=DPI)
    bucket.write(paths.of(path), data.getvalue())


def cut(text: str, length: int) -> str:
    """Returns `text`, shortened with an ellipsis to at most `length` characters."""
    if len(text) <= length:
        return text
    return text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


@contextlib.contextmanager
def any_script() -> Iterator[None]:
    """Draws names in any script, with the fonts that there are; a decorator, too.

    Signs that no font has are boxes, without a warning.
    """
    import matplotlib
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in _FONTS if name in known)]
    settings: Any = {"font.family": families}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def text_width(figure: Any, text: str, **style: Any) -> float:
    """Returns the width of `text` in pixels when drawn."""
    probe = figure.text(0, 0, text, **style)
    width = probe.get_window_extent(figure.canvas.get_renderer()).width
    probe.remove()
    return float(width)


def new_figure(width: int, height: int) -> Any:
    """Returns a white figure of `width` x `height` pixels at DPI."""
    from matplotlib import figure
    from matplotlib.backends import backend_agg

    # The canvas rounds down: without the 0.01, 313 / 150 * 150 could become 312.
    size = ((width + 0.01) / DPI, (height + 0.01) / DPI)
    result = figure.Figure(figsize=size, dpi=DPI, facecolor="white")
    backend_agg.FigureCanvasAgg(result)
    return result
