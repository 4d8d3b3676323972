"""A run that each release leaves unfinished, for the next to go on with.

`python tests/earlier.py` writes that of this release to tests/golden/runs/VERSION: run
it when a version is given out, and keep those that are there. Weights are one number
a leaf, so that the folder stays small.
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import tiny

from lakd_jax import config as config_lib
from lakd_jax import version
from lakd_jax.interop import weights
from lakd_jax.runs import single
from lakd_jax.runtime import interrupt
from lakd_jax.store import checkpoint
from lakd_jax.training import evaluate, spec
from lakd_jax.training import state as state_lib

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "runs"
FIELDS = {"method": "lakd", "epochs": 2, "checkpoint__every_steps": 5}
STOPPED = 12  # of 20 steps, two into the second epoch


def config() -> config_lib.ConfigDict:
    """With paths that are the same everywhere."""
    return config_lib.resolve(tiny.config(pathlib.Path("runs"), **FIELDS))


def train(settings, directory, guard):
    """Trains on the tiny data with a teacher made of nothing, on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    bench = single.on_mesh(tiny.dataset(), mesh, guard, lambda text: None)
    with single.prepare(directory, settings):
        return single.train_one(settings, directory, bench, _teacher(mesh))


def _teacher(mesh):
    model = weights.models.create("resnet8", num_classes=3)
    variables = state_lib.replicate(tiny.variables(model), mesh)
    pixels = spec.Pixels((0.4,) * 3, (0.3,) * 3, jax.numpy.dtype("float32"))
    loaded = weights.Loaded(model, variables, "none")
    return single.Teacher(loaded, pixels, evaluate.Score(15, 45, 1.0), 1)


def _plain(name: str, leaf: np.ndarray) -> np.ndarray:
    """The leaf with all numbers alike where that leaves a network that can learn."""
    if leaf.ndim == 0:
        return leaf
    last = name.rsplit("/", 1)[1]
    values = {"kernel": 0.02, "scale": 1.0, "var": 1.0}
    moving = "opt_state" in name
    return np.full_like(leaf, 0.0 if moving else values.get(last, 0.0))


def write() -> pathlib.Path:
    """Writes this release's run."""
    folder = FOLDER / version.VERSION
    shutil.rmtree(folder, ignore_errors=True)
    try:
        train(config(), folder, tiny.StopAfter(STOPPED - 1 + 3))
    except interrupt.Interrupted:
        pass
    step, arrays, extra = checkpoint.read_arrays(folder / "checkpoints", None)
    shutil.rmtree(folder / "checkpoints")
    state = {name: _plain(name, leaf) for name, leaf in arrays.items()}
    with checkpoint.Checkpointer(folder / "checkpoints", keep=1) as saver:
        saver.save(step, checkpoint.manifests.nest(state), extra=extra)
    for file in folder.iterdir():
        if file.name not in ("config.json", "metrics.jsonl", "checkpoints"):
            file.unlink()
    return folder


if __name__ == "__main__":
    print(json.dumps({"written": str(write())}), file=sys.stderr)
