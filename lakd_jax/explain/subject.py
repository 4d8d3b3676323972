"""A finished run brought back: its student, its teacher, its images, its past."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from lakd_jax import config as config_lib
from lakd_jax import distill, errors
from lakd_jax.data import order
from lakd_jax.interop import weights
from lakd_jax.models import chain
from lakd_jax.runs import single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import checkpoint, workdir
from lakd_jax.training import setup, spec, vam

PyTree = Any
BATCH = 128
_NO_VARIABLES = ("step", "opt_state")  # of what a checkpoint has of training


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        directory: of the run.
        config: of the run, resolved.
        bench: its data and devices.
        student: the network and its variables at the end.
        pixels: how the student is fed.
        teacher: None where the method has none.
        result: what `result.json` holds.
    """

    directory: Path
    config: config_lib.ConfigDict
    bench: single.Bench
    student: weights.Loaded
    pixels: spec.Pixels
    teacher: single.Teacher | None
    result: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch of its training."""
        c = self.config
        examples = len(self.bench.dataset.train)
        return order.steps_per_epoch(examples, c.batch_size, c.data.drop_last)


def load(
    directory: Path, guard: interrupt.Guard, notify: Callable[[str], None]
) -> Subject:
    """Everything of the finished run in `directory`.

    Raises:
        errors.ExportError: there is none, or it was made by another version.
        errors.LakdError: its images or its teacher are not there any more.
    """
    settings = workdir.settings(directory)
    try:
        config = config_lib.from_dict(settings)
    except ValueError as error:
        raise errors.ExportError(f"{directory / workdir.CONFIG}: {error}") from error
    bench = single.bench(config, guard, notify)
    finished = config_lib.changed(config, {"student.init": str(directory)})
    student = single.load_network("student", finished, bench)
    teacher = None
    if distill.facts(config.method).needs_teacher:
        teacher = teacher_lib.make(config, bench)
    result = workdir.read_json(directory / workdir.RESULT)
    pixels = setup.pixels(config)
    return Subject(directory, config, bench, student, pixels, teacher, result)


def past(subject: Subject) -> Iterator[tuple[int, PyTree]]:
    """(step, the student's variables) of every checkpoint that is still there.

    They are those of `subject.student.model`: checkpoints have gates that it has not.
    """
    folder = subject.directory / workdir.CHECKPOINTS
    model = subject.student.model.clone(vam=setup.vam_options(subject.config))
    for step in checkpoint.list_steps(folder):
        _, arrays, _ = checkpoint.read_arrays(folder, step)
        yield step, vam.deployed(model, part(arrays, "student"))[1]


def part(arrays: dict[str, np.ndarray], name: str) -> PyTree:
    """The variables of the student or of the method ("student", "method").

    Args:
        arrays: of a checkpoint, as "train/params/student/stem/conv/kernel".
    """
    leaves = {}
    for key, array in arrays.items():
        tree, *path = key.split("/")
        if tree == "train" and path[1:2] == [name] and path[0] not in _NO_VARIABLES:
            leaves[path[0], *path[2:]] = array
    return flax.traverse_util.unflatten_dict(leaves)


def observe(
    model: chain.Chain,
    variables: PyTree,
    pixels: spec.Pixels,
    images: np.ndarray,
    joints: tuple[str, ...],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (n, classes) and the activations at `joints` (n, H, W, C), in batches.

    Args:
        images: (n, H, W, 3) uint8; the last batch is filled up, so that one program
            serves all.
    """

    @jax.jit
    def run(variables: PyTree, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        outputs: Any = model.apply(variables, pixels(images), train=False)
        return outputs.logits, [chain.feature_at(outputs, model, j) for j in joints]

    parts = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        filled = np.concatenate([batch, np.repeat(batch[:1], BATCH - len(batch), 0)])
        parts.append(jax.device_get(run(variables, filled)))
    count = len(images)
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)
