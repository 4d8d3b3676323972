"""What a checkpoint must hold: a name, dtype, shape and CRC32 for every leaf.

Plain trees, numpy and JSON only; `checkpoint` reads and writes the files.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import jax
import numpy as np

from lakd_jax import errors

PyTree = Any
FORMAT = 1
_SHOWN = 8


class DamagedError(errors.NoCheckpointError):
    """The files of one checkpoint are incomplete or were altered."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as {"params/stem/conv/kernel": leaf}."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in paths
    }


def host_leaves(state: PyTree) -> dict[str, np.ndarray]:
    """Every leaf in host memory, by name; on CPU as views of the buffers.

    Copy or drop them before the buffers are donated. A replicated leaf is read from
    one device.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
            # Of its own, so that the state's array does not keep the host copy.
            leaves[name] = leaf.addressable_data(0)
            leaves[name].copy_to_host_async()
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def digest(tree: PyTree) -> str:
    """Sixteen hex digits of the names, dtypes, shapes and values of all leaves."""
    found = hashlib.blake2b(digest_size=8)
    for name, leaf in sorted(host_leaves(tree).items()):
        found.update(f"{name}{leaf.dtype}{leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()


def place(host: np.ndarray, like: Any) -> Any:
    """Turns a host array into what `like` is: sharded, numpy or a plain number."""
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(host, like.sharding)
    return host if isinstance(like, np.ndarray) else type(like)(host[()])


def describe(
    step: int, hosts: dict[str, np.ndarray], extra: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a checkpoint, JSON all through, with a CRC32 of its own.

    Args:
      step: number of finished training steps.
      hosts: leaves by name.
      extra: anything JSON can hold.

    Raises:
      TypeError: `extra` has something JSON cannot hold.
    """
    leaves = {
        name: {"crc32": _crc(x), "dtype": x.dtype.name, "shape": list(x.shape)}
        for name, x in hosts.items()
    }
    body = {"format": FORMAT, "step": step, "leaves": leaves, "extra": extra}
    # Through text and back first: JSON turns tuples to lists and keys to strings.
    body = json.loads(json.dumps(body))
    return body | {"crc32": _json_crc(body)}


def check_manifest(manifest: Any, step: int) -> None:
    """Raises `DamagedError` unless the manifest is whole and of `step`."""
    if not isinstance(manifest, dict):
        raise DamagedError("the manifest is not one")
    body = {key: value for key, value in manifest.items() if key != "crc32"}
    if manifest.get("crc32") != _json_crc(body) or body.get("step") != step:
        raise DamagedError("the manifest does not match its checksum or its step")
    if body["format"] > FORMAT:
        raise errors.WorkdirError(
            f"checkpoint {step} was written by a newer release of lakd_jax\n"
            "Install that release, or use another --workdir."
        )


def check_leaves(manifest: dict[str, Any], hosts: dict[str, np.ndarray]) -> None:
    """Raises `DamagedError` naming the first leaf that is not what was saved."""
    for name, entry in manifest["leaves"].items():
        host = hosts.get(name)
        if host is None or _spec(host) != _stored(entry):
            raise DamagedError(f"leaf {name} is missing or of another shape")
        if _crc(host) != entry["crc32"]:
            raise DamagedError(f"leaf {name} does not match its checksum")


def check_structure(manifest: dict[str, Any], template: PyTree, where: str) -> None:
    """Raises `WorkdirError` listing leaves whose name, dtype or shape differ."""
    stored = {name: _stored(entry) for name, entry in manifest["leaves"].items()}
    needed = {name: _spec(leaf) for name, leaf in named_leaves(template).items()}
    wrong = [
        f"  {name}: stored {stored.get(name, 'not')}, needed {needed.get(name, 'not')}"
        for name in sorted(stored.keys() | needed.keys())
        if stored.get(name) != needed.get(name)
    ]
    if wrong:
        more = f" (first {_SHOWN} shown)" if len(wrong) > _SHOWN else ""
        raise errors.WorkdirError(
            f"{where} has another structure, {len(wrong)} leaves differ{more}:\n"
            + "\n".join(wrong[:_SHOWN])
            + "\nUse another --workdir, or the model and method it was made with."
        )


def stored_zeros(manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Zeros of each stored dtype and shape that take no memory."""
    return {
        name: np.broadcast_to(np.zeros((), np.dtype(entry["dtype"])), entry["shape"])
        for name, entry in manifest["leaves"].items()
    }


def nest(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turns {"a/b": x} into {"a": {"b": x}}, less arrays without elements.

    Orbax refuses those; the manifest alone is enough to make them again.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        if leaf.size == 0:
            continue
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def _spec(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _stored(entry: dict[str, Any]) -> str:
    return f"{entry['dtype']}{entry['shape']}"


def _crc(host: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)


def _json_crc(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
