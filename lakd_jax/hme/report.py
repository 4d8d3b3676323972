"""Renders the report's section on an HME: gates, tree and shared experts."""

from pathlib import Path

import numpy as np

from lakd_jax.hme import network, tree
from lakd_jax.report import grids, page


def section(
    params: dict, names: tuple[str, ...], dataset: str, scratch: Path
) -> list[str]:
    """Returns the parts of the report's section on the experts.

    Args:
        params: the network's parameters.
        names: class names.
        dataset: name of the data set; superclasses are shown if it has known ones.
        scratch: folder for pictures.
    """
    found = [np.asarray(gate) for gate in network.gates(params)]
    made = tree.tree(found)
    parts = [page.text(_WORDS), _entropies(found), *_tree(found, names, scratch)]
    parts += [_heat_maps(found, names, scratch)]
    dead = sum(map(len, made.dead))
    parts.append(
        page.text(
            f"{dead} of {sum(made.experts)} experts serve no class; the "
            f"{len(names)} classes take {made.distinct_paths} different paths."
        )
    )
    return parts + _superclasses(made, dataset)


_WORDS = (
    "Every class is a task that reads the features of one expert of the last level, "
    "which in turn reads one expert of the level above: the largest entry of each gate "
    "defines the tree. Entropy is that of softmax(M / tau) divided by log(parents): 1 "
    "for undecided gates, 0 for decided ones. Temperatures are fixed, since at that of "
    "training, entropy falls by itself. This is our interpretation of KDExplainer's "
    "measure."
)


def _entropies(found: list[np.ndarray]) -> str:
    header = ["tau", *(f"gate {k}" for k in range(1, len(found) + 1)), "mean"]
    rows = []
    for temperature in tree.TEMPERATURES:
        levels = tree.conflict(found, temperature)
        values = [f"{value:.4f}" for value in (*levels, np.mean(levels))]
        rows.append([f"{temperature:g}", *values])
    return page.table(header, rows)


def _tree(found: list[np.ndarray], names: tuple[str, ...], scratch: Path) -> list[str]:
    made, tau = tree.tree(found), tree.TEMPERATURES[0]
    weights = [tree.attention(gate, tau) for gate in found]
    # Experts follow the order of the classes below them, so that no edges cross.
    paths = [made.paths[label] for label in made.order]
    alive = [list(dict.fromkeys(level)) for level in zip(*paths, strict=True)]
    first: list[tuple[str, int | None, float]]
    first = [(f"1.{i + 1}", None, 0.5) for i in alive[0]]
    levels, above = [first], alive[0]
    for gate, children in enumerate((*alive[1:], list(made.order))):
        last = gate == len(found) - 1
        level: list[tuple[str, int | None, float]] = []
        for child in children:
            parent = made.parents[gate][child]
            label = names[child] if last else f"{gate + 2}.{child + 1}"
            weight = float(weights[gate][child, parent])
            level.append((label, above.index(parent), weight))
        levels.append(level)
        above = children
    path = scratch / "tree.png"
    grids.tree(path, levels)
    description = "The tree from the image through the experts to the classes."
    dot = page.code("source for Graphviz", tree.dot(found, names, tau))
    return [page.picture(path, description), dot]


def _heat_maps(found: list[np.ndarray], names: tuple[str, ...], scratch: Path) -> str:
    order = list(tree.tree(found).order)
    weights = tree.attention(found[-1], tree.TEMPERATURES[0])[order]
    path = scratch / "gates.png"
    grids.matrices(
        path,
        [(f"the last gate at tau = {tree.TEMPERATURES[0]:g}", weights)],
        rows=[names[label] for label in order],
        columns=[f"{len(found)}.{i + 1}" for i in range(weights.shape[1])],
        row_title="class, ordered by path",
        column_title="expert",
    )
    return page.picture(
        path, "Weight of each expert of the last level in each class's mixture."
    )


def _superclasses(made: tree.Tree, dataset: str) -> list[str]:
    groups = tree.SUPERCLASSES.get(dataset)
    if groups is None or len(groups) != len(made.paths):
        return []
    rows = [
        [f"level {k}", f"{100 * share.same:.1f} %", f"{100 * share.chance:.1f} %"]
        for k, share in enumerate(tree.shares(made, groups), 1)
    ]
    header = ["", "pairs of a superclass with a common ancestor", "all pairs"]
    return [page.table(header, rows)]
