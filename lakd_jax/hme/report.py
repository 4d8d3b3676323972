"""What a report says of an HME: its gates, its tree, what its tasks share."""

from pathlib import Path

import numpy as np

from lakd_jax.hme import network, tree
from lakd_jax.report import grids, page


def section(
    params: dict, names: tuple[str, ...], dataset: str, scratch: Path
) -> list[str]:
    """The parts of the report's section on the experts.

    Args:
        params: of the network.
        names: of the classes.
        dataset: its name, from which superclasses are known or not.
        scratch: a folder for pictures.
    """
    found = [np.asarray(gate) for gate in network.gates(params)]
    made = tree.tree(found)
    parts = [page.text(_WORDS), _entropies(found), *_tree(found, names, scratch)]
    parts += [_heat_maps(found, names, scratch)]
    dead = sum(map(len, made.dead))
    parts.append(
        page.text(
            f"{dead} of {sum(made.experts)} experts serve no class; the "
            f"{len(names)} classes take {made.distinct_paths} different ways."
        )
    )
    return parts + _superclasses(made, dataset)


_WORDS = (
    "Every class is a task that takes its features from one expert of the last level, "
    "which takes its own from one of the level above: the largest entry of each gate "
    "makes the tree. Entropy is that of softmax(M / tau) over log(parents), 1 for "
    "gates that have not decided and 0 for decided ones, at fixed temperatures, since "
    "that of training falls by itself. Our reading of KDExplainer's measure."
)


def _entropies(found: list[np.ndarray]) -> str:
    header = ["tau", *(f"gate {k}" for k in range(1, len(found) + 1)), "mean"]
    rows = []
    for temperature in tree.TEMPERATURES:
        told = tree.conflict(found, temperature)
        values = [f"{value:.4f}" for value in (*told.levels, told.mean)]
        rows.append([f"{temperature:g}", *values])
    return page.table(header, rows)


def _tree(found: list[np.ndarray], names: tuple[str, ...], scratch: Path) -> list[str]:
    made, tau = tree.tree(found), tree.TEMPERATURES[0]
    weights = [tree.attention(gate, tau) for gate in found]
    # Experts in the order of the classes below them, so that no two edges cross.
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
    described = "The tree from the image through the experts to the classes."
    dot = page.code("the same for Graphviz", tree.dot(found, names, tau))
    return [page.picture(path, described), dot]


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
    return page.picture(path, "How much each class takes of each last expert.")


def _superclasses(made: tree.Tree, dataset: str) -> list[str]:
    groups = tree.SUPERCLASSES.get(dataset)
    if groups is None or len(groups) != len(made.paths):
        return []
    rows = [
        [f"level {k}", f"{100 * share.same:.1f} %", f"{100 * share.chance:.1f} %"]
        for k, share in enumerate(tree.shares(made, groups), 1)
    ]
    header = ["", "pairs of a superclass with one ancestor", "all pairs"]
    return [page.table(header, rows)]
