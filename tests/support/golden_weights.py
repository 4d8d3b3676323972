"""Made-up PyTorch weights for the golden tests, from nothing but names and shapes.

The golden files were computed by the public PyTorch implementations with exactly
these numbers: each tensor comes from a NumPy generator of its own, seeded by the
CRC-32 of its name, so no weights need to be stored.
"""

import functools
import json
import math
import pathlib
import re
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "golden"


def tensor(name: str, shape: tuple[int, ...], gain: float = 0.5) -> np.ndarray:
    """The float32 tensor called `name`, in PyTorch's layout.

    `gain` is the share of the variance that kernels and matrices pass on.
    """
    generator = np.random.default_rng(zlib.crc32(name.encode("ascii")))
    noise = generator.standard_normal(shape)
    if name.endswith(("cls_token", "dist_token", "pos_embed")):  # as patches are
        values = 0.5 * noise
    elif name.endswith(("gamma", "layer_scale")):  # of a branch, not as small as usual
        values = 0.5 + 0.1 * noise
    elif len(shape) > 1:  # kernel of a convolution, matrix of a linear layer
        values = noise * np.sqrt(gain / math.prod(shape[1:]))
    elif name.endswith("running_var"):
        values = np.exp(0.1 * noise)
    elif name.endswith("weight"):  # scale of a norm
        values = 1.0 + 0.1 * noise
    else:
        values = 0.1 * noise
    return values.astype(np.float32)


def conv(name: str, *shape: int) -> dict[str, np.ndarray]:
    """The kernel of the convolution `name`, HWIO; `shape` is PyTorch's, OIHW."""
    return {"kernel": tensor(f"{name}.weight", shape).transpose(2, 3, 1, 0)}


def bias(name: str, width: int) -> dict[str, np.ndarray]:
    """The bias of the layer `name`."""
    return {"bias": tensor(f"{name}.bias", (width,))}


def norm(name: str, width: int) -> dict[str, np.ndarray]:
    """Scale and bias of the batch norm `name`."""
    return {"scale": tensor(f"{name}.weight", (width,)), **bias(name, width)}


def spec(name: str) -> dict:
    """What is known of the golden network `name` besides its results."""
    return json.loads((FOLDER / "models" / f"{name}.json").read_text())


def state_dict(name: str) -> dict[str, np.ndarray]:
    """All weights of the golden network `name`."""
    found = spec(name)
    gain = found.get("gain", 0.5)
    return {key: tensor(key, tuple(shape), gain) for key, shape in found["state_dict"]}


def outputs(name: str) -> dict[str, np.ndarray]:
    """The reference's results for the golden network `name`."""
    with np.load(FOLDER / "models" / f"{name}.npz") as file:
        return dict(file)


def images(name: str) -> np.ndarray:
    """The input (B, side, side, 3) of the golden network `name`, NHWC."""
    shape = re.search(r"\((\d+), 3, (\d+), \2\)", spec(name)["input"])
    batch, side = map(int, shape.groups())
    nchw = np.random.default_rng(7).standard_normal((batch, 3, side, side))
    return nchw.astype(np.float32).transpose(0, 2, 3, 1)


def classes(name: str) -> int:
    """Width of the logits of the golden network `name`."""
    return spec(name)["num_classes"]


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of `name`.npz, such as "losses"; feature maps are NHWC."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: nhwc(x) for key, x in file.items()}


def nhwc(x: np.ndarray) -> np.ndarray:
    """`x` with its channels last, if it is a feature map."""
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def distance(ours: np.ndarray, golden: np.ndarray) -> float:
    """Relative L2 distance |ours - golden| / |golden|, in double precision."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    assert ours.shape == golden.shape
    return float(np.linalg.norm(ours - golden) / np.linalg.norm(golden))
