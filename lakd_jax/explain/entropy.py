"""Measures how much of an image a network discards: the entropy per region.

Cheng et al., "Explaining Knowledge Distillation by Quantifying the Knowledge" (CVPR
2020, arXiv 2003.03622), section 3, with the numbers of the authors' code. Noise of a
standard deviation of its own in every cell of a grid is added to the image, as much as
leaves the feature nearly the same; its entropy is large where the network does not
depend on the pixels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
# Maps variables and inputs (n, H, W, 3) to features (n, ...).
Features = Callable[[PyTree, jax.Array], jax.Array]
# Returns noise (n, H, W, 3) for the number of a round; `INITIAL` scales the error.
Noise = Callable[[jax.Array | int], jax.Array]

INITIAL = -1
CELLS = 16  # per side of the grid
_SIGMA, _LOWEST, _HIGHEST = 0.01, 0.001, 1.0
_CONSTANT = 0.5 * math.log(2 * math.pi) + 0.5  # of a Gaussian's entropy
_PROGRAM = 1 << 20  # noisy pixels that one program processes at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the noise of an image is fitted; the defaults are the authors'.

    Attributes:
        rounds: updates of the noise.
        draws: noisy images per round.
        weight: of the entropy against the error; the authors take 7 for VGG and 6 for
            ResNets.
        check_after: the number of rounds after which an image is finished if its
            entropy exceeds `target`, and else has its weight multiplied by `raised`.
        target: the mean entropy at which images are compared.
        learning_rate: of plain SGD.
    """

    rounds: int = 80
    draws: int = 96
    weight: float = 6.0
    check_after: int = 60
    raised: float = 1.5
    target: float = -2.8
    learning_rate: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Fit:
    """The noise fitted to images, arrays (N, ...).

    Attributes:
        sigma: (N, cells, cells) in the round whose mean entropy is nearest the target.
        scale: (N,) the error of the feature at first; 0 means that noise has no effect,
            so the image cannot be used.
        round: (N,) that round, counted from 0.
        rounds: (N,) how many were made.
        weight: (N,) of the entropy in the last of them.
        entropies, errors: (N, all rounds) mean entropy, and the error over `scale`.
    """

    sigma: np.ndarray
    scale: np.ndarray
    round: np.ndarray
    rounds: np.ndarray
    weight: np.ndarray
    entropies: np.ndarray
    errors: np.ndarray

    @property
    def grids(self) -> np.ndarray:
        """Returns the entropy (N, cells, cells) in nats per pixel and channel."""
        return entropy(self.sigma)


def cells(side: int) -> int:
    """Returns the cells per side of the grid for images of height and width `side`.

    Smaller images than the grid have one cell per pixel.
    """
    return min(CELLS, side)


def entropy(sigma: Any) -> Any:
    """Returns the entropy of Gaussian noise of standard deviation `sigma`."""
    log = jnp.log if isinstance(sigma, jax.Array) else np.log
    return log(sigma) + _CONSTANT


def enlarged(grid: jax.Array, height: int, width: int) -> jax.Array:
    """Returns (H, W, 1) from a square grid, by the nearest cell as in PyTorch."""
    count = len(grid)
    rows, columns = (np.arange(n) * count // n for n in (height, width))
    return grid[rows][:, columns, None]


def fit(
    features: Features,
    variables: PyTree,
    image: jax.Array,
    noise: Noise,
    settings: Settings,
) -> dict[str, jax.Array]:
    """Fits noise to one image; returns the entries of `Fit` without the first axis.

    Args:
        features: of the network in evaluation mode; negative values count as 0.
        variables: of the network.
        image: (H, W, 3) as the network receives it.
        noise: standard normal, differs from round to round.
        settings: of the fit.
    """
    height, width = image.shape[:2]
    clean = jax.nn.relu(features(variables, image[None]))

    def error(sigma: jax.Array, draws: jax.Array) -> jax.Array:
        noisy = image[None] + enlarged(sigma, height, width)[None] * draws
        return jnp.mean(jnp.square(jax.nn.relu(features(variables, noisy)) - clean))

    start = jnp.full((cells(min(height, width)),) * 2, _SIGMA, jnp.float32)
    scale = error(start, noise(INITIAL))
    divisor = jnp.where(scale > 0, scale, 1.0)

    def objective(sigma: jax.Array, draws: jax.Array, weight: jax.Array) -> Any:
        value = error(sigma, draws) / divisor
        mean = jnp.mean(entropy(sigma))
        return value - weight * mean, (value, mean)

    def one_round(carry: dict[str, jax.Array], i: jax.Array) -> Any:
        sigma = jnp.clip(carry["sigma"], _LOWEST, _HIGHEST)
        gradient, (value, mean) = jax.grad(objective, has_aux=True)(
            sigma, noise(i), carry["weight"]
        )
        distance = jnp.abs(mean - settings.target)
        is_nearer = carry["active"] & (distance < carry["distance"])
        highest = jnp.maximum(carry["highest"], mean)
        at_check = carry["active"] & (i + 1 == settings.check_after)
        ends = at_check & (highest > settings.target)
        after = carry | {
            "sigma": sigma - settings.learning_rate * gradient,
            "best": jnp.where(is_nearer, sigma, carry["best"]),
            "round": jnp.where(is_nearer, i, carry["round"]),
            "distance": jnp.where(is_nearer, distance, carry["distance"]),
            "highest": highest,
            "rounds": carry["rounds"] + carry["active"],
            "weight": carry["weight"]
            * jnp.where(at_check & ~ends, settings.raised, 1.0),
            "active": carry["active"] & ~ends,
        }
        return after, (mean, value)

    first = {
        "sigma": start,
        "best": start,
        "round": jnp.int32(0),
        "distance": jnp.float32(jnp.inf),
        "highest": jnp.float32(-jnp.inf),
        "rounds": jnp.int32(0),
        "weight": jnp.float32(settings.weight),
        "active": jnp.bool_(True),
    }
    last, (entropies, errors) = jax.lax.scan(
        one_round, first, jnp.arange(settings.rounds)
    )
    kept = {name: last[name] for name in ("round", "rounds", "weight")}
    histories = {"entropies": entropies, "errors": errors}
    return {"sigma": last["best"], "scale": scale} | kept | histories


class Fitter:
    """Fits noise to the same images for any variables of one network.

    Several images are processed by one program, as many as `_PROGRAM` allows.
    """

    def __init__(self, features: Features, images: np.ndarray, settings: Settings):
        """Prepares the fit; `images` are (N, H, W, 3) as the network receives them."""
        self._images = np.asarray(images, np.float32)
        _, height, width, _ = self._images.shape
        together = _PROGRAM // (settings.draws * height * width)
        self._together = max(1, min(together, len(self._images)))
        shape = (settings.draws, *self._images.shape[1:])

        def of_image(variables: PyTree, image: jax.Array, number: jax.Array) -> Any:
            key = jax.random.fold_in(jax.random.key(0), number)

            def noise(i: jax.Array | int) -> jax.Array:
                return jax.random.normal(jax.random.fold_in(key, i + 1), shape)

            return fit(features, variables, image, noise, settings)

        self._run = jax.jit(jax.vmap(of_image, in_axes=(None, 0, 0)))

    def __call__(self, variables: PyTree, check: Callable[[], None]) -> Fit:
        """Returns the fit for `variables`; `check` is called between programs."""
        numbers, parts = np.arange(len(self._images)), []
        for start in range(0, len(numbers), self._together):
            check()
            # The last program takes images that were fitted before, if it must.
            begin = max(0, min(start, len(numbers) - self._together))
            chosen = numbers[begin : begin + self._together]
            found = jax.device_get(self._run(variables, self._images[chosen], chosen))
            parts.append(jax.tree.map(lambda x, n=start - begin: x[n:], found))
        merged = functools.partial(jax.tree.map, lambda *x: np.concatenate(x))
        return Fit(**merged(*parts))
