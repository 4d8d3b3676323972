"""Measures what a network discards of an image: the entropy per region.

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

from lakd_jax.models import pooling

PyTree = Any
# Maps variables and inputs (n, H, W, 3) to features (n, ...).
Features = Callable[[PyTree, jax.Array], jax.Array]
Network = Callable[[jax.Array], jax.Array]  # `Features` of given variables
# Maps an image's number, a round's number (`INITIAL` for what scales the error) and a
# shape (n, H, W, 3) to standard normal noise.
Noise = Callable[[jax.Array, jax.Array | int, tuple[int, ...]], jax.Array]
State = dict[str, jax.Array]  # of the fit of one image between rounds

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


def normal(number: jax.Array, i: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Returns the noise of image `number` in round `i`; depends on nothing else."""
    key = jax.random.fold_in(jax.random.key(0), number)
    return jax.random.normal(jax.random.fold_in(key, i + 1), shape)


class Fitter:
    """Fits noise to the same images for any variables of one network.

    One program makes one round of several images, as many as `_PROGRAM` allows. A loop
    over the rounds inside a program would take four to six times as long on CPU, where
    XLA runs convolutions inside loops on one thread and with slower kernels.
    """

    def __init__(
        self,
        features: Features,
        images: np.ndarray,
        settings: Settings,
        noise: Noise = normal,
    ):
        """Prepares the fit.

        Args:
            features: of the network in evaluation mode; negative values count as 0.
            images: (N, H, W, 3) as the network receives them.
            settings: of the fit.
            noise: differs from round to round; is traced.
        """
        self._images = np.asarray(images, np.float32)
        self._rounds = settings.rounds
        _, height, width, _ = self._images.shape
        together = _PROGRAM // (settings.draws * height * width)
        self._together = max(1, min(together, len(self._images)))
        shape = (settings.draws, *self._images.shape[1:])

        def start(variables: PyTree, image: jax.Array, number: jax.Array) -> State:
            draws = noise(number, INITIAL, shape)
            network = functools.partial(features, variables)
            return _start(network, image, draws, settings)

        def one_round(
            state: State,
            variables: PyTree,
            image: jax.Array,
            number: jax.Array,
            i: jax.Array,
        ) -> tuple[State, dict[str, jax.Array]]:
            draws = noise(number, i, shape)
            network = functools.partial(features, variables)
            return _one_round(state, network, image, draws, i, settings)

        self._start = jax.jit(jax.vmap(start, (None, 0, 0)))
        self._one_round = jax.jit(
            jax.vmap(one_round, (0, None, 0, 0, None)), donate_argnums=0
        )

    def __call__(self, variables: PyTree, check: Callable[[], None]) -> Fit:
        """Returns the fit for `variables`; `check` is called before each round."""
        numbers, parts = np.arange(len(self._images)), []
        variables = jax.device_put(variables)  # once, not in every round
        for start in range(0, len(numbers), self._together):
            # The last program takes images that were fitted before, if it must.
            begin = max(0, min(start, len(numbers) - self._together))
            found = self._fit(variables, numbers[begin : begin + self._together], check)
            parts.append(jax.tree.map(lambda x, n=start - begin: x[n:], found))
        return Fit(**jax.tree.map(lambda *x: np.concatenate(x), *parts))

    def _fit(
        self, variables: PyTree, numbers: np.ndarray, check: Callable[[], None]
    ) -> dict[str, np.ndarray]:
        """Returns the attributes of `Fit` for the images of these numbers."""
        inputs = variables, *jax.device_put((self._images[numbers], numbers))
        state, histories = self._start(*inputs), []
        for i in range(self._rounds):
            check()
            state, values = self._one_round(state, *inputs, i)
            # Waits for the round before, while this one runs: with all rounds queued,
            # an interruption would have to wait for the last of them.
            jax.block_until_ready(histories[-1:])
            histories.append(values)
        kept = {name: state[name] for name in ("scale", "round", "rounds", "weight")}
        kept["sigma"] = state["best"]
        kept, histories = jax.device_get((kept, histories))
        return kept | jax.tree.map(lambda *x: np.stack(x, 1), *histories)


def _start(
    network: Network, image: jax.Array, draws: jax.Array, settings: Settings
) -> State:
    """Returns the state of an image (H, W, 3) before its first round."""
    sigma = jnp.full((cells(min(image.shape[:2])),) * 2, _SIGMA, jnp.float32)
    clean = jax.nn.relu(network(image[None]))
    return {
        "clean": clean,
        "scale": _error(sigma, clean, network, image, draws),
        "sigma": sigma,
        "best": sigma,
        "round": jnp.int32(0),
        "distance": jnp.float32(jnp.inf),
        "highest": jnp.float32(-jnp.inf),
        "rounds": jnp.int32(0),
        "weight": jnp.float32(settings.weight),
        "active": jnp.bool_(True),
    }


def _error(
    sigma: jax.Array,
    clean: jax.Array,
    network: Network,
    image: jax.Array,
    draws: jax.Array,
) -> jax.Array:
    """Returns the mean squared error of the feature with noise of deviation `sigma`."""
    each = pooling.resize_nearest(sigma[None, ..., None], *image.shape[:2])
    noisy = image[None] + each * draws
    return jnp.mean(jnp.square(jax.nn.relu(network(noisy)) - clean))


def _one_round(
    state: State,
    network: Network,
    image: jax.Array,
    draws: jax.Array,
    i: jax.Array,
    settings: Settings,
) -> tuple[State, dict[str, jax.Array]]:
    """Returns the state after round `i`; and its mean entropy and relative error."""
    divisor = jnp.where(state["scale"] > 0, state["scale"], 1.0)

    def objective(sigma: jax.Array) -> Any:
        error = _error(sigma, state["clean"], network, image, draws)
        mean = jnp.mean(entropy(sigma))
        return error / divisor - state["weight"] * mean, (error / divisor, mean)

    sigma = jnp.clip(state["sigma"], _LOWEST, _HIGHEST)
    gradient, (error, mean) = jax.grad(objective, has_aux=True)(sigma)
    distance = jnp.abs(mean - settings.target)
    is_nearer = state["active"] & (distance < state["distance"])
    highest = jnp.maximum(state["highest"], mean)
    at_check = state["active"] & (i + 1 == settings.check_after)
    ends = at_check & (highest > settings.target)
    after = state | {
        "sigma": sigma - settings.learning_rate * gradient,
        "best": jnp.where(is_nearer, sigma, state["best"]),
        "round": jnp.where(is_nearer, i, state["round"]),
        "distance": jnp.where(is_nearer, distance, state["distance"]),
        "highest": highest,
        "rounds": state["rounds"] + state["active"],
        "weight": state["weight"] * jnp.where(at_check & ~ends, settings.raised, 1.0),
        "active": state["active"] & ~ends,
    }
    return after, {"entropies": mean, "errors": error}
