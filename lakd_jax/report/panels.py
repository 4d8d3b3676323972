"""Draws deletion and insertion curves in a grid of panels."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lakd_jax.report import canvas
from lakd_jax.report import curves as curves_lib

_SIZE = (620, 400)  # pixels of a panel


class Line(Protocol):
    """One curve: the values of a module's mask, or of a random one."""

    @property
    def module(self) -> str:
        """The name of the module."""
        ...

    @property
    def random(self) -> bool:
        """Whether the mask is random."""
        ...

    @property
    def values(self) -> Sequence[float]:
        """The values at the shares."""
        ...


@canvas.any_script()
def curves(
    path: canvas.Path,
    grid: Mapping[tuple[str, str], Sequence[Line]],
    shares: Sequence[float],
) -> None:
    """Draws one panel per (row, column), with a line per module and kind of mask.

    Args:
      path: image file to write; the suffix selects the format.
      grid: from the titles of row and column to the curves, whose random ones are
        dashed.
      shares: where they have their values, from 0 to 1.
    """
    rows, columns = ([*dict.fromkeys(key[i] for key in grid)] for i in (0, 1))
    figure = canvas.new_figure(len(columns) * _SIZE[0], len(rows) * _SIZE[1])
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            _panel(axes[i, j], grid[row, column], shares)
            axes[i, j].set_title(f"{row}, {column}", fontsize=9, loc="left")
        axes[i, 0].set_ylabel("probability of its answer", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("share of the pixels", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    canvas.save(figure, path)


def _panel(axis: Any, lines: Sequence[Line], shares: Sequence[float]) -> None:
    modules = [*dict.fromkeys(line.module for line in lines)]
    colours = curves_lib.COLOURS
    for line in lines:
        axis.plot(
            shares,
            line.values,
            color=colours[modules.index(line.module) % len(colours)],
            linestyle="--" if line.random else "-",
            linewidth=1.2,
            label=canvas.cut(line.module, 20) + (", random" if line.random else ""),
        )
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.tick_params(labelsize=7, colors=canvas.INK)
    axis.grid(color="#e4e4e4", linewidth=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
