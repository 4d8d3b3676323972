"""The devices of a run as one mesh, and what lies whole or split on it."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any


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
    sharding = replicated(mesh)

    def whole(x: Any) -> jax.Array:
        copies = [jax.device_put(jnp.array(x), d) for d in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(jnp.shape(x), sharding, copies)

    return jax.tree.map(whole, on_one_device(tree))


def described(tree: PyTree, mesh: Mesh) -> PyTree:
    """The shapes and types of what `replicate` would make."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        tree,
    )


def on_one_device(tree: PyTree) -> PyTree:
    """What is whole on every device, from one device of this process."""
    return jax.tree.map(
        lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The first axis, or another one, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def of_batch(mesh: Mesh, examples: int) -> NamedSharding:
    """Split over the devices if `examples` divide equally among them, else whole."""
    return over_batch(mesh) if examples % mesh.size == 0 else replicated(mesh)
