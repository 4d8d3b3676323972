"""What training carries from step to step, and how it is spread over devices."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lakd_jax import data

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """One subtree per network part: `{"student": ..., "method": ...}`.

    Attributes:
      step: finished updates, int32 scalar.
      params: float32 parameters of the student and of the method.
      collections: the mutable collections that the two have, such as "batch_stats",
        by their names in Linen.
      opt_state: of the optimiser over `params`.
    """

    step: jax.Array
    params: PyTree
    collections: dict[str, PyTree]
    opt_state: PyTree

    def to_tree(self) -> dict[str, PyTree]:
        """Returns what checkpoints hold: collections stand beside the parameters."""
        fixed = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return fixed | self.collections

    @classmethod
    def from_tree(cls, tree: Mapping[str, PyTree]) -> "TrainState":
        """Returns the state of which `to_tree` made `tree`."""
        collections = dict(tree)
        fixed = [collections.pop(name) for name in ("step", "params", "opt_state")]
        step, params, opt_state = fixed
        return cls(step, params, collections, opt_state)

    def variables(self, part: str) -> dict[str, PyTree]:
        """Returns those of "student" or "method", as Linen's `apply` takes them."""
        kinds = {"params": self.params} | self.collections
        return {kind: tree[part] for kind, tree in kinds.items()}


@flax.struct.dataclass
class DeviceData:
    """A split kept on the devices: images (N,H,W,3) uint8, labels, ids (N,).

    `key` is the augmentation's, `noise` that of what networks draw themselves
    (dropout); they travel with the data, so that runs of several seeds share one
    compiled program. With `whole` it is a batch, already cut, of which all is used.
    """

    images: jax.Array
    labels: jax.Array
    ids: jax.Array
    key: jax.Array
    noise: jax.Array
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    def at(self, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images, labels and ids of the examples at `rows` (B,)."""
        everything = self.images, self.labels, self.ids
        if self.whole:
            return everything
        images, labels, ids = (x[rows] for x in everything)
        return images, labels, ids


# What random numbers are for; folded into the run's seed.
INITIALISE, AUGMENT, NOISE, INITIALISE_AGAIN = range(4)


def device_data(split: data.Split, seed: int, mesh: Mesh) -> DeviceData:
    """A split whole on every device, with the keys of `seed`."""
    host: Any = (split.images, split.labels, split.ids)
    return replicate(DeviceData(*host, **keys(seed)), mesh)


def rekeyed(data: DeviceData, seed: int, mesh: Mesh) -> DeviceData:
    """The same arrays with the keys of another seed."""
    return dataclasses.replace(data, **replicate(keys(seed), mesh))


def keys(seed: int) -> dict[str, jax.Array]:
    """The fields `key` and `noise` of `DeviceData`."""
    root = jax.random.key(seed)
    purposes = {"key": AUGMENT, "noise": NOISE}
    return {name: jax.random.fold_in(root, p) for name, p in purposes.items()}


def data_mesh() -> Mesh:
    """All devices of all processes in one axis, over which batches are split."""
    return Mesh(np.array(by_process(jax.devices())), ("data",))


def by_process(devices: Iterable[Any]) -> list[Any]:
    """Sorted so that those of a process are neighbours, process 0 first.

    A process hands over one piece of a batch, the one with its number. Devices of a
    TPU pod are numbered by their place in it, across processes.
    """
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every leaf whole on every device, in buffers of its own.

    Each process fills its own devices, so all must call it with the same numbers.
    The copies matter: `device_put` may alias its argument, and the step donates
    what it is given.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def whole(x: Any) -> jax.Array:
        copies = [jax.device_put(jnp.array(x), d) for d in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(jnp.shape(x), sharding, copies)

    return jax.tree.map(whole, on_one_device(tree))


def on_one_device(tree: PyTree) -> PyTree:
    """What is whole on every device, from one device of this process."""
    return jax.tree.map(
        lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree
    )


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def parameter_count(params: PyTree) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(x.size for x in jax.tree.leaves(params))
