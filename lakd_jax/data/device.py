"""Splits on the devices, and the keys of what is drawn there."""

import dataclasses
from typing import Any

import flax
import jax
from jax.sharding import Mesh

from lakd_jax.data import dataset
from lakd_jax.runtime import mesh as mesh_lib

# What random numbers are for; folded into the run's seed.
INITIALISE, AUGMENT, NOISE, INITIALISE_AGAIN = range(4)


@flax.struct.dataclass
class DeviceData:
    """A split kept on the devices: images uint8, labels and ids (N,).

    Images are flat (N, H*W*3): a gather of rows needs no other layout then. Of images
    (N,H,W,3) a TPU would copy the whole split, padded fourfold, in every program.

    `shape` is that of an image. `key` is the augmentation's, `noise` that of what
    networks draw themselves (dropout); they travel with the data, so that runs of
    several seeds share one compiled program. With `whole` it is a batch (B,H,W,3),
    already cut, of which all is used.
    """

    images: jax.Array
    labels: jax.Array
    ids: jax.Array
    key: jax.Array
    noise: jax.Array
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    def at(self, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images (B,H,W,3), labels and ids of the examples at `rows` (B,)."""
        everything = self.images, self.labels, self.ids
        if self.whole:
            return everything
        images, labels, ids = (x[rows] for x in everything)
        return images.reshape(-1, *self.shape), labels, ids


def device_data(split: dataset.Split, seed: int, mesh: Mesh) -> DeviceData:
    """A split whole on every device, with the keys of `seed`."""
    flat = split.images.reshape(len(split), -1)
    host: Any = (flat, split.labels, split.ids, *keys(seed).values(), split.shape)
    return mesh_lib.replicate(DeviceData(*host), mesh)


def rekeyed(data: DeviceData, seed: int, mesh: Mesh) -> DeviceData:
    """The same arrays with the keys of another seed."""
    return dataclasses.replace(data, **mesh_lib.replicate(keys(seed), mesh))


def keys(seed: int) -> dict[str, jax.Array]:
    """The fields `key` and `noise` of `DeviceData`."""
    root = jax.random.key(seed)
    purposes = {"key": AUGMENT, "noise": NOISE}
    return {name: jax.random.fold_in(root, p) for name, p in purposes.items()}
