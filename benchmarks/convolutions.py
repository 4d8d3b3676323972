"""Times every convolution of a network, forwards and backwards, against PyTorch's.

    taskset -c 0 python -m benchmarks.convolutions --network=resnet8

A training step on CPU consists mostly of these. Each convolution is timed alone, in
turn, with the compiler options of training and with channels last in PyTorch;
"backward" is both gradients together. The sums count each convolution as often as it
occurs in the network.
"""

import argparse
import collections
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from lakd_jax import models
from lakd_jax.runtime import backend

Timed = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Shapes (NHWC and HWIO), strides and padding of a convolution."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


def found(network: str, batch: int) -> collections.Counter[Convolution]:
    """Counts the convolutions of a network for images of 32x32."""
    model = models.create(network, num_classes=10)
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda x: model.init(jax.random.key(0), x, train=False))
    return collections.Counter(
        Convolution(
            *(tuple(v.aval.shape) for v in e.invars),
            tuple(e.params["window_strides"]),
            tuple(e.params["padding"]),
        )
        for e in _equations(traced(images).jaxpr)
        if e.primitive.name == "conv_general_dilated"
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


def ours(of: Convolution, image: np.ndarray, kernel: np.ndarray) -> Timed:
    """Returns compiled functions that run once and wait for the result."""

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        move = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=names)
        return move(x, w, of.strides, of.padding)

    def backward(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple:
        return jax.vjp(forward, x, w)[1](g)

    x, w = jnp.asarray(image), jnp.asarray(kernel)
    given = (x, w, jnp.ones_like(forward(x, w)))

    def compiled(function: Callable, *arguments: Any) -> Callable[[], Any]:
        program = jax.jit(function).lower(*arguments)
        run = program.compile(compiler_options=backend.compiler_options())
        return lambda: jax.block_until_ready(run(*arguments))

    return {
        "forward": compiled(forward, x, w),
        "backward": compiled(backward, *given),
    }


def torchs(of: Convolution, image: np.ndarray, kernel: np.ndarray) -> Timed:
    """Returns the same in PyTorch, where padding must be equal on both sides."""
    import torch

    last = torch.channels_last
    x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()).to(memory_format=last)
    w = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).to(memory_format=last)
    if any(low != high for low, high in of.padding):
        raise ValueError(f"{of}: PyTorch's convolutions pad both sides alike")
    padding = tuple(low for low, _ in of.padding)
    move = functools.partial(
        torch.nn.functional.conv2d, stride=of.strides, padding=padding
    )
    x.requires_grad_(), w.requires_grad_()
    y = move(x, w)
    g = torch.ones_like(y, memory_format=last)

    def forward() -> None:
        with torch.no_grad():
            move(x, w)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(y, (x, w), g, retain_graph=True),
    }


def medians(sides: dict[str, Timed], repeats: int) -> dict[tuple[str, str], float]:
    """Returns milliseconds by (side, direction); the sides take turns."""
    times = collections.defaultdict(list)
    for turn in range(repeats + 2):  # the first two warm up
        for side, functions in sides.items():
            for direction, function in functions.items():
                began = time.perf_counter()
                function()
                if turn > 1:
                    spent = time.perf_counter() - began
                    times[side, direction].append(1000 * spent)
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    """Prints a row for each convolution, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--repeats", default=15, type=int)
    chosen = parser.parse_args()
    backend.prepare(cache="")
    rng, total = np.random.default_rng(0), collections.Counter()
    columns = [(s, d) for d in ("forward", "backward") for s in ("ours", "PyTorch")]
    print(f"| image | kernel | stride | times | {' | '.join(map(' '.join, columns))} |")
    print("| --- | --- | --: | --: |" + " --: |" * len(columns))
    for of, count in found(chosen.network, chosen.batch).items():
        image, kernel = (
            rng.standard_normal(s, np.float32) for s in (of.image, of.kernel)
        )
        sides = {
            "ours": ours(of, image, kernel),
            "PyTorch": torchs(of, image, kernel),
        }
        took = medians(sides, chosen.repeats)
        total.update({key: count * took[key] for key in columns})
        shape = ["x".join(map(str, x)) for x in (of.image[1:], of.kernel)]
        cells = [*shape, of.strides[0], count, *(f"{took[c]:.2f}" for c in columns)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    sums = " | ".join(f"{total[c]:.1f}" for c in columns)
    print(f"| all, ms | | | | {sums} |")


if __name__ == "__main__":
    main()
