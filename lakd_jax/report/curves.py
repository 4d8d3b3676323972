"""Draws accuracy and loss over epochs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lakd_jax.report import canvas

# Okabe and Ito's palette, safe for colour-blind readers, without the yellow, which
# is unreadable on white. Once all colours are used, the line pattern changes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
PATTERNS = ("-", "--", ":", "-.")
_SIZE = (1350, 1050)  # pixels


Points = Sequence[tuple[float, float]]  # (epoch, value); values may not be finite


@dataclasses.dataclass(frozen=True)
class _End:
    """The end point of a line and its label."""

    epoch: float
    value: float
    label: str
    colour: str
    pattern: str


@canvas.any_script()
def curves(
    path: canvas.Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    teacher_accuracy: float | None = None,
) -> None:
    """Draws accuracy and loss over epochs, one line per run, labelled at its end.

    Args:
      path: image file to write (1350 x 1050 pixels); the suffix selects the format.
      runs: records by run name, as returned by `metrics.read`; only records of kind
        "eval" that have "epoch" and the values are drawn.
      teacher_accuracy: the teacher's accuracy on the test split, drawn as a
        horizontal line; None omits it.
    """
    figure = canvas.new_figure(*_SIZE)
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2), hspace=0.1)
    top = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=top)
    ends = _plot(top, _points(runs, "accuracy", 100.0), "{name}  {value:.1f}")
    # The first loss can be a hundred times the last.
    ends_below = _plot(below, _points(runs, "loss", 1.0), "{name}", log=True)
    if teacher_accuracy is not None and ends:
        level = 100 * teacher_accuracy
        top.axhline(level, color=canvas.FAINT, linestyle="--", linewidth=1.2)
        label = f"teacher on test  {level:.1f}"
        ends.append(_End(math.inf, level, label, canvas.FAINT, "--"))
    _dress(top, "accuracy on minival, %", bool(ends))
    _dress(below, "loss on minival", bool(ends_below))
    top.tick_params(labelbottom=False)
    below.set_xlabel("epoch", color=canvas.INK)
    if not ends and not ends_below:
        below.set_xticks([])
    figure.align_ylabels()
    _save(path, figure, [(top, ends), (below, ends_below)], top=0.97, bottom=0.075)


@canvas.any_script()
def lines(
    path: canvas.Path,
    series: Mapping[str, Points],
    *,
    label: str,
    logarithmic: bool = True,
) -> None:
    """Draws one panel of lines over epochs, each labelled at its end.

    Args:
      path: image file to write (1350 x 600 pixels); the suffix selects the format.
      series: points by name; values that are not finite are omitted.
      label: label of the vertical axis.
      logarithmic: whether this axis is, if all series end above 0.
    """
    figure = canvas.new_figure(_SIZE[0], 600)
    axes = figure.add_subplot()
    ends = _plot(axes, series, "{name}  {value:.3f}", log=logarithmic)
    _dress(axes, label, bool(ends))
    axes.set_xlabel("epoch", color=canvas.INK)
    _save(path, figure, [(axes, ends)], top=0.96, bottom=0.13)


def _points(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, scale: float
) -> dict[str, Points]:
    return {
        run: [
            (record["epoch"], scale * record[name])
            for record in records
            if record["kind"] == "eval" and name in record and "epoch" in record
        ]
        for run, records in runs.items()
    }


def _plot(
    axes: Any, series: Mapping[str, Points], label: str, log: bool = False
) -> list[_End]:
    """Plots the series that have finite values; `log` scales them if they can be."""
    ends = []
    for index, (name, points) in enumerate(series.items()):
        epochs, values = np.asarray(points, np.float64).reshape(-1, 2).T
        finite = np.flatnonzero(np.isfinite(values))
        if not finite.size:
            continue
        colour = COLOURS[index % len(COLOURS)]
        pattern = PATTERNS[index // len(COLOURS) % len(PATTERNS)]
        axes.plot(
            epochs,
            values,
            color=colour,
            linestyle=pattern,
            linewidth=1.6,
            marker="o" if len(epochs) <= 30 else "",
            markersize=3,
            clip_on=False,  # the last point lies on the edge
        )
        epoch, value = epochs[finite[-1]], float(values[finite[-1]])
        text = label.format(name=canvas.cut(name, 34), value=value)
        ends.append(_End(epoch, value, text, colour, pattern))
    if log and ends and all(end.value > 0 for end in ends):
        axes.set_yscale("log")
    return ends


def _dress(axes: Any, label: str, filled: bool) -> None:
    axes.set_ylabel(label, color=canvas.INK)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors=canvas.INK, labelsize=9)
    if filled:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_yticks([])
        place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no evaluations recorded", color=canvas.FAINT, **place)


# Offsets in pixels from the right edge of the axes: a thin line fans out from the
# curve's end to the height of its label, then a sample of the line's pattern, then
# the text.
_FAN, _SAMPLE, _TEXT = 26, 62, 72


def _save(
    path: canvas.Path,
    figure: Any,
    panels: Sequence[tuple[Any, Sequence[_End]]],
    **margins: float,
) -> None:
    """Labels the ends of the lines of each (axes, ends), and writes the picture."""
    style = {"fontsize": 9, "parse_math": False}
    labels = [end.label for _, ends in panels for end in ends]
    widths = [canvas.text_width(figure, label, **style) for label in labels]
    right = (_TEXT + 12 + max(widths, default=0)) / _SIZE[0]
    figure.subplots_adjust(left=0.085, right=1 - right, **margins)
    for axes, ends in panels:
        _label_ends(axes, ends)
    canvas.save(figure, path)


def _label_ends(axes: Any, ends: Sequence[_End]) -> None:
    from matplotlib import lines

    line: Any = lines.Line2D
    box = axes.get_window_extent()
    right = axes.get_xlim()[1]
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # freeze the limits
    values = [(right, end.value) for end in ends]
    starts = [float(y) - box.y0 for _, y in map(axes.transData.transform, values)]
    heights = spread(starts, 25, box.height)
    for end, start, height in zip(ends, starts, heights, strict=True):
        style = {"color": end.colour, "transform": None, "clip_on": False}
        x = box.x1 + np.array([0, _FAN, _SAMPLE])
        y = box.y0 + np.array([start, height, height])
        fan = line(x[:2], y[:2], linewidth=0.8, **style)
        sample = line(x[1:], y[1:], linewidth=1.8, linestyle=end.pattern, **style)
        for part in (fan, sample):
            axes.figure.add_artist(part)
        place = {"transform": None, "va": "center_baseline", "fontsize": 9}
        place["parse_math"] = False  # a name may contain dollar signs
        axes.figure.text(box.x1 + _TEXT, y[1], end.label, color=canvas.INK, **place)
        if end.epoch < right:  # a run that ended before others
            level = [end.value, end.value]
            axes.plot([end.epoch, right], level, ":", color=end.colour, linewidth=0.8)


def spread(targets: Sequence[float], gap: float, height: float) -> list[float]:
    """Returns positions near `targets`, in the same order, at least `gap` apart.

    Positions stay between 0 and `height` unless there are too many to fit.
    """
    order = sorted(range(len(targets)), key=lambda i: targets[i])
    # Neighbours that are too close merge into a block centred on their mean.
    blocks: list[tuple[float, int]] = []  # (mean target, members)
    for index in order:
        mean, count = float(targets[index]), 1
        while blocks:
            below, members = blocks[-1]
            if mean - below >= gap * (count + members) / 2:
                break
            blocks.pop()
            mean = (mean * count + below * members) / (count + members)
            count += members
        blocks.append((mean, count))
    placed = [
        mean + gap * (i - (count - 1) / 2)
        for mean, count in blocks
        for i in range(count)
    ]
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], height - gap * (len(placed) - 1 - i))
    for i in range(len(placed)):
        placed[i] = max(placed[i], gap * i)
    return [placed[order.index(i)] for i in range(len(targets))]
