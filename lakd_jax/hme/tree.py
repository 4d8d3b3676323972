"""Analyses the gates of an HME: conflict between tasks, and the tree they select.

Source: KDExplainer (arXiv 2105.04181) interprets a lower entropy of the gates under
distillation as fewer conflicts between the tasks. Its formula is not published, so the
measures here are our interpretation. They use a fixed temperature: at the temperature
of training, 10 / epoch, entropy falls by itself, even if nothing is learnt.

Gates are the matrices returned by `hme.network.gates`: one (children, parents) per
boundary between levels, from the image to the classes. NumPy only, so results are
deterministic.
"""

import collections.abc
import dataclasses
import itertools

import numpy as np

# At which runs are compared; the first is the released code's.
TEMPERATURES = (0.5, 1.0)

Gates = collections.abc.Sequence[np.ndarray]

# The superclass of each label: vehicles and animals, or CIFAR-100's twenty.
SUPERCLASSES: dict[str, tuple[int, ...]] = {
    "cifar10": (0, 0, 1, 1, 1, 1, 1, 1, 0, 0),
    "cifar100": (
        *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11),
        *(6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5),
        *(5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17),
        *(10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
        *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
    ),
}


@dataclasses.dataclass(frozen=True)
class Share:
    """Shares of class pairs with a common ancestor in one level.

    Attributes:
        same: share among pairs within a superclass, in [0, 1].
        chance: share among all pairs, expected for random superclasses.
    """

    same: float
    chance: float


@dataclasses.dataclass(frozen=True)
class Tree:
    """The tree selected by hard gates; indices count from 0 within each level.

    Attributes:
        parents: for each gate, the parent of every child; the last gate's children are
            the classes.
        experts: number of experts per level.
    """

    parents: tuple[tuple[int, ...], ...]
    experts: tuple[int, ...]

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Returns the experts on the path from the image to each class's head."""
        nodes, levels = list(range(len(self.parents[-1]))), []
        for parents in reversed(self.parents):
            nodes = [parents[node] for node in nodes]
            levels.append(nodes)
        return tuple(zip(*reversed(levels), strict=True))

    @property
    def alive(self) -> tuple[tuple[int, ...], ...]:
        """Returns, per level, the experts that serve at least one class."""
        levels = zip(*self.paths, strict=True)
        return tuple(tuple(sorted(set(level))) for level in levels)

    @property
    def dead(self) -> tuple[tuple[int, ...], ...]:
        """Returns, per level, the experts that serve no class."""
        pairs = zip(self.experts, self.alive, strict=True)
        return tuple(
            tuple(i for i in range(count) if i not in alive) for count, alive in pairs
        )

    @property
    def distinct_paths(self) -> int:
        """Returns the number of different paths that classes take."""
        return len(set(self.paths))

    @property
    def order(self) -> tuple[int, ...]:
        """Returns the classes sorted by path, which groups related ones."""
        paths = self.paths
        return tuple(sorted(range(len(paths)), key=lambda label: (paths[label], label)))


def attention(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Computes softmax(M / tau): (children, parents) float64, rows sum to 1."""
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def conflict(gates: Gates, temperature: float) -> list[float]:
    """Measures the indecision of each gate; our interpretation, see above.

    Args:
        gates: (children, parents) each.
        temperature: tau > 0, the same for all runs that are compared.

    Returns:
        For each gate, the mean over children of entropy(row) / log(parents): 1 for
        uniform rows, 0 for one-hot rows and single parents.

    Raises:
        ValueError: consecutive gates do not fit together, or tau is not above 0.
    """
    _check(gates)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    levels = []
    for logits in gates:
        entropy = _entropy(attention(logits, temperature))
        largest = np.log(logits.shape[1])
        levels.append(float(entropy.mean() / largest) if largest else 0.0)
    return levels


def _entropy(weights: np.ndarray) -> np.ndarray:
    """Computes -sum p log p over the last axis, with 0 log 0 = 0."""
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return np.maximum(-np.sum(weights * logs, axis=-1), 0.0)


def tree(gates: Gates) -> Tree:
    """Returns the tree of each row's largest entry, the first of equal ones.

    Raises:
        ValueError: consecutive gates do not fit together.
    """
    _check(gates)
    parents = tuple(tuple(int(i) for i in np.argmax(g, axis=-1)) for g in gates)
    return Tree(parents, tuple(g.shape[1] for g in gates))


def shares(tree: Tree, groups: collections.abc.Sequence[int]) -> tuple[Share, ...]:
    """Measures, per level, how often classes of one superclass share an ancestor.

    Args:
        tree: the network's tree.
        groups: the superclass of every class, such as `SUPERCLASSES["cifar10"]`.

    Raises:
        ValueError: `groups` does not have one entry per class, or no two classes are
            in one superclass.
    """
    if len(groups) != len(tree.paths):
        raise ValueError(f"{len(groups)} groups given for {len(tree.paths)} classes")
    pairs = list(itertools.combinations(range(len(groups)), 2))
    related = [(a, b) for a, b in pairs if groups[a] == groups[b]]
    if not related:
        raise ValueError("no two classes are in the same group")
    result = []
    for level in range(len(tree.experts)):
        node = [path[level] for path in tree.paths]
        together = [
            sum(node[a] == node[b] for a, b in chosen) / len(chosen)
            for chosen in (related, pairs)
        ]
        result.append(Share(*together))
    return tuple(result)


def dot(gates: Gates, names: collections.abc.Sequence[str], temperature: float) -> str:
    """Returns the tree as Graphviz source, from the image down to the classes.

    Experts that serve no class are omitted. Label and width of an edge show its
    attention at `temperature`. Expert 3.2 is the second of the third level.

    Args:
        gates: (children, parents) each.
        names: class names.
        temperature: tau > 0.

    Raises:
        ValueError: consecutive gates do not fit together, or `names` does not have one
            entry per class.
    """
    made = tree(gates)
    if len(names) != len(made.paths):
        raise ValueError(f"{len(names)} names given for {len(made.paths)} classes")
    weights = [attention(logits, temperature) for logits in gates]
    lines = ["digraph tree {", "  node [shape=box];", '  image [label="image"];']
    for level, experts in enumerate(made.alive, 1):
        for i in experts:
            lines.append(f'  e{level}_{i + 1} [label="{level}.{i + 1}"];')
    for label in made.order:
        lines.append(f'  c{label} [label="{_escape(names[label])}", shape=ellipse];')
    lines += [f"  image -> e1_{i + 1};" for i in made.alive[0]]
    for gate, children in enumerate((*made.alive[1:], made.order)):
        last = gate == len(gates) - 1
        for child in children:
            parent = made.parents[gate][child]
            name = f"c{child}" if last else f"e{gate + 2}_{child + 1}"
            weight = float(weights[gate][child, parent])
            lines.append(
                f"  e{gate + 1}_{parent + 1} -> {name} "
                f'[label="{weight:.2f}", penwidth={1 + 4 * weight:.2f}];'
            )
    return "\n".join([*lines, "}", ""])


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _check(gates: Gates) -> None:
    if not gates:
        raise ValueError("no gates given")
    for number, (one, other) in enumerate(itertools.pairwise(gates), 1):
        if one.shape[0] != other.shape[1]:
            raise ValueError(
                f"gate {number} has {one.shape[0]} children, gate {number + 1} "
                f"{other.shape[1]} parents: both must be the number of experts between"
            )
