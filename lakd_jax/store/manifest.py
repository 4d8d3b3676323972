"""The manifest of a checkpoint: name, dtype, shape and CRC32 of every leaf.

Works on plain trees, NumPy arrays and JSON; `checkpoint` reads and writes the files.
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
    """Returns the leaves by path, such as {"params/stem/conv/kernel": leaf}."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in paths
    }


def host_leaves(state: PyTree) -> dict[str, np.ndarray]:
    """Returns every leaf in host memory, by name; on CPU as views of the buffers.

    Views must be copied or dropped before the buffers are donated. A replicated leaf is
    read from one device.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
            # A separate array, so that the state's array does not keep the host copy.
            leaves[name] = leaf.addressable_data(0)
            leaves[name].copy_to_host_async()
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def digest(tree: PyTree) -> str:
    """Returns 16 hex digits: a hash of all leaves' names, dtypes, shapes, values."""
    result = hashlib.blake2b(digest_size=8)
    for name, leaf in sorted(host_leaves(tree).items()):
        result.update(f"{name}{leaf.dtype}{leaf.shape}".encode())
        result.update(np.ascontiguousarray(leaf).data)
    return result.hexdigest()


def place(host: np.ndarray, like: Any) -> Any:
    """Converts a host array to the kind of `like`: sharded, NumPy or a plain number."""
    if isinstance(like, jax.Array):
        return jax.device_put(host, like.sharding)
    return host if isinstance(like, np.ndarray) else type(like)(host[()])


def describe(
    step: int, leaves: dict[str, np.ndarray], extra: dict[str, Any]
) -> dict[str, Any]:
    """Builds the manifest of a checkpoint, as JSON values with a CRC32 of itself.

    Args:
      step: number of finished training steps.
      leaves: host arrays by name.
      extra: JSON-serialisable values.

    Raises:
      TypeError: `extra` cannot be serialised.
    """
    entries = {
        name: {"crc32": _crc(x), "dtype": x.dtype.name, "shape": list(x.shape)}
        for name, x in leaves.items()
    }
    body = {"format": FORMAT, "step": step, "leaves": entries, "extra": extra}
    # To text and back, since JSON turns tuples into lists and keys into strings.
    body = json.loads(json.dumps(body))
    return body | {"crc32": _json_crc(body)}


def check_manifest(manifest: Any, step: int) -> None:
    """Raises `DamagedError` unless the manifest is intact and for `step`."""
    if not isinstance(manifest, dict):
        raise DamagedError("the manifest is not a JSON object")
    body = {key: value for key, value in manifest.items() if key != "crc32"}
    if manifest.get("crc32") != _json_crc(body) or body.get("step") != step:
        raise DamagedError("the manifest does not match its checksum or its step")
    if body["format"] > FORMAT:
        raise errors.WorkdirError(
            f"checkpoint {step} was written by a newer release of lakd_jax\n"
            "Install that release, or use another --workdir."
        )


def check_leaves(manifest: dict[str, Any], leaves: dict[str, np.ndarray]) -> None:
    """Raises `DamagedError` naming the first leaf that differs from the saved one."""
    for name, entry in manifest["leaves"].items():
        leaf = leaves.get(name)
        if leaf is None or _spec(leaf) != _stored_spec(entry):
            raise DamagedError(f"leaf {name} is missing or of another shape")
        if _crc(leaf) != entry["crc32"]:
            raise DamagedError(f"leaf {name} does not match its checksum")


def check_structure(manifest: dict[str, Any], template: PyTree, where: str) -> None:
    """Raises `WorkdirError` listing leaves whose name, dtype or shape differ."""
    stored = {name: _stored_spec(entry) for name, entry in manifest["leaves"].items()}
    needed = {name: _spec(leaf) for name, leaf in named_leaves(template).items()}
    differences = [
        f"  {name}: stored {stored.get(name, 'not')}, needed {needed.get(name, 'not')}"
        for name in sorted(stored.keys() | needed.keys())
        if stored.get(name) != needed.get(name)
    ]
    if differences:
        more = f" (first {_SHOWN} shown)" if len(differences) > _SHOWN else ""
        raise errors.WorkdirError(
            f"{where} has another structure, {len(differences)} leaves differ{more}:\n"
            + "\n".join(differences[:_SHOWN])
            + "\nUse another --workdir, or the model and method it was made with."
        )


def stored_zeros(manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns zeros of each stored dtype and shape, without allocating memory."""
    return {
        name: np.broadcast_to(np.zeros((), np.dtype(entry["dtype"])), entry["shape"])
        for name, entry in manifest["leaves"].items()
    }


def nest(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turns {"a/b": x} into {"a": {"b": x}}, dropping arrays without elements.

    Orbax refuses those; they are recreated from the manifest.
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


def _stored_spec(entry: dict[str, Any]) -> str:
    return f"{entry['dtype']}{entry['shape']}"


def _crc(host: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)


def _json_crc(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
