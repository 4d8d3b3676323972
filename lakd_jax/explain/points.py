"""Counts knowledge points, and computes how they were learnt over checkpoints.

The measures of Cheng et al. (arXiv 2003.03622), sections 3.1 and 3.2, from the entropy
grids of images at checkpoints, see `entropy`.
"""

import dataclasses

import numpy as np

MARGIN = 0.2  # of a point's entropy below the background's, in nats


@dataclasses.dataclass(frozen=True)
class Points:
    """The knowledge points of a network, per image and checkpoint.

    Attributes:
        grids: (N, checkpoints, cells, cells) entropies.
        foreground: (N, cells, cells) which cells belong to the object.
        background: (checkpoints,) mean over images of the background's mean entropy.
        found: as `grids`, whether a cell is a point: its entropy lies `MARGIN` below.
    """

    grids: np.ndarray
    foreground: np.ndarray
    background: np.ndarray
    found: np.ndarray

    @property
    def on_foreground(self) -> np.ndarray:
        """Returns the number of points (N, checkpoints) on the foreground."""
        return (self.found & self.foreground[:, None]).sum((2, 3))

    @property
    def on_background(self) -> np.ndarray:
        """Returns the number of points (N, checkpoints) on the background."""
        return (self.found & ~self.foreground[:, None]).sum((2, 3))

    @property
    def ratio(self) -> np.ndarray:
        """Returns the foreground's share of all points (N, checkpoints), 0 if none."""
        total = self.on_foreground + self.on_background
        return self.on_foreground / np.maximum(total, 1)

    @property
    def stability(self) -> float:
        """Returns rho, the share of all points ever found that the last checkpoint has.

        The mean over images, on the foreground; 0 for an image without points.
        """
        found = self.found & self.foreground[:, None]
        last, ever = found[:, -1].sum((1, 2)), found.any(1).sum((1, 2))
        return float(np.mean(last / np.maximum(ever, 1)))

    def when(self, distance: np.ndarray) -> np.ndarray:
        """Returns the distance (N,) at which images had most points on the foreground.

        At the first such checkpoint. The mean over images is D_mean, the standard
        deviation D_std.

        Args:
            distance: (checkpoints,) that the weights had travelled.
        """
        return np.asarray(distance)[self.on_foreground.argmax(1)]


def count(grids: np.ndarray, foreground: np.ndarray) -> Points:
    """Finds the knowledge points.

    Args:
        grids: (N, checkpoints, cells, cells) entropies.
        foreground: (N, cells, cells) bool; every image has both kinds of cells.
    """
    background = _means(grids, ~foreground).mean(0)
    found = background[:, None, None] - grids > MARGIN
    return Points(grids, foreground, background, found)


def usable(grids: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Returns which images (N,) have the larger mean entropy on the background.

    At every checkpoint of `grids`. The network looks elsewhere in the others, so that
    their background is none.
    """
    inside, outside = _means(grids, foreground), _means(grids, ~foreground)
    return np.all(outside >= inside, axis=1)


def central(cells: int) -> np.ndarray:
    """Returns the foreground (cells, cells) of images without annotations, a box.

    Cells 2 to 13 of 16 both ways, as the authors take for ILSVRC.
    """
    margin = max(1, cells // 8)
    inside = np.zeros((cells, cells), bool)
    inside[margin : cells - margin, margin : cells - margin] = True
    return inside


def _means(grids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Returns the mean (N, checkpoints) over the cells `kept` (N, cells, cells)."""
    total = np.where(kept[:, None], grids, 0.0).sum((2, 3), dtype=np.float64)
    return total / kept.sum((1, 2))[:, None]
