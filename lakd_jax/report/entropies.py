"""Draws entropy maps: which regions of images networks use."""

from collections.abc import Mapping

import numpy as np

from lakd_jax.report import canvas

_TILE, _LEFT, _RIGHT, _TOP = 130, 10, 110, 40  # pixels


@canvas.any_script()
def entropies(
    path: canvas.Path, images: np.ndarray, maps: Mapping[str, np.ndarray]
) -> None:
    """Draws images and, for each network, their entropy maps on one colour scale.

    Args:
      path: image file to write; the suffix selects the format.
      images: (N, H, W, 3) uint8, N >= 1.
      maps: title -> (N, cells, cells), at least one.
    """
    from matplotlib import cm, colors

    columns = 1 + len(maps)
    width = _LEFT + columns * _TILE + _RIGHT
    figure = canvas.new_figure(width, _TOP + len(images) * _TILE)
    axes = figure.subplots(len(images), columns, squeeze=False)
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        top=1 - _TOP / (_TOP + len(images) * _TILE),
        bottom=0,
        wspace=0.06,
        hspace=0.06,
    )
    low = min(float(m.min()) for m in maps.values())
    high = max(float(m.max()) for m in maps.values())
    scale = cm.ScalarMappable(colors.Normalize(low, high), "viridis")
    for row, image in zip(axes, images, strict=True):
        row[0].imshow(image, interpolation="nearest")
    for column, (title, grids) in enumerate(maps.items(), 1):
        axes[0, column].set_title(
            canvas.cut(title, 18), fontsize=7, color=canvas.INK, parse_math=False
        )
        for row, grid in enumerate(grids):
            axes[row, column].imshow(grid, norm=scale.norm, cmap=scale.cmap)
    for axis in axes.flat:
        axis.set_axis_off()
    place = (1 - (_RIGHT - 20) / width, 0.2, 14 / width, 0.6)
    bar = figure.colorbar(scale, cax=figure.add_axes(place))
    bar.ax.tick_params(labelsize=6)
    bar.set_label("entropy", fontsize=7, color=canvas.INK)
    canvas.save(figure, path)
