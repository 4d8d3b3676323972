"""States to save, and how to tell that they came back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def replicated():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def make_state(seed=0, shape=(48, 16)):
    """Parameters, momentum, bfloat16, integers, key data, numpy and plain numbers."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "stem": {"kernel": jax.random.normal(keys[0], shape)},
        "head": {"bias": jax.random.normal(keys[1], (10,))},
    }
    on_device = {
        "params": params,
        "opt": optax.trace(0.9)
        .init(params)
        ._replace(trace=jax.tree.map(lambda x: 3 * x, params)),
        "bank": jax.random.normal(keys[2], (8, 4), jnp.bfloat16),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(keys[2]),
    }
    on_host = {"best": np.float32(seed / 3), "table": np.arange(6), "epoch": seed}
    return jax.device_put(on_device, replicated()) | on_host


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def is_same(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
