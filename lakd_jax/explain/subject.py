"""Loads a finished run: student, teacher, images and past checkpoints."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from lakd_jax import config as config_lib
from lakd_jax import distill, errors
from lakd_jax.config import resolved
from lakd_jax.data import order
from lakd_jax.interop import weights
from lakd_jax.models import chain
from lakd_jax.runs import single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import checkpoint, workdir
from lakd_jax.training import setup, vam
from lakd_jax.training import spec as spec_lib

PyTree = Any
BATCH = 128
_NO_VARIABLES = ("step", "opt_state")  # of what a checkpoint has of training


@dataclasses.dataclass(frozen=True)
class Subject:
    """The run that a report describes.

    Attributes:
        directory: the run's directory.
        config: the run's resolved config.
        bench: its data and devices.
        student: the network with its final variables.
        pixels: converts uint8 images to the student's input.
        teacher: None if the method has no teacher.
        result: the contents of `result.json`.
    """

    directory: Path
    config: resolved.Config
    environment: single.Environment
    student: weights.Loaded
    pixels: spec_lib.Pixels
    teacher: single.Teacher | None
    result: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        """Returns the number of updates per training epoch."""
        c = self.config
        examples = len(self.environment.dataset.train)
        return order.steps_per_epoch(examples, c.batch_size, c.data.drop_last)


def load(
    directory: Path, guard: interrupt.Guard, notify: Callable[[str], None]
) -> Subject:
    """Loads the finished run in `directory`.

    Raises:
        errors.ExportError: there is none, or another version made it.
        errors.LakdError: its images or its teacher are no longer available.
    """
    config = _config(directory)
    folder = workdir.folder(directory)
    environment = single.environment(config, guard, notify, folder)
    student = single.load_network("student", config, environment, str(directory))
    teacher = None
    if distill.facts(config.method).needs_teacher:
        teacher = teacher_lib.load_recorded(directory, config, environment)
    environment = single.of_student(config, environment)
    result = workdir.read_json(directory / workdir.RESULT)
    pixels = setup.pixels(config)
    return Subject(directory, config, environment, student, pixels, teacher, result)


def other(subject: Subject, directory: Path) -> Subject:
    """Returns another finished run, described with the data of `subject`.

    Such as a baseline, or the run of the teacher. It has no teacher here.

    Raises:
        errors.ExportError: another version made it.
        errors.TeacherError: its student is missing or damaged.
    """
    config = _config(directory)
    student, _ = weights.student(directory / workdir.STUDENT, config.dtype)
    result = workdir.read_json(directory / workdir.RESULT)
    return dataclasses.replace(
        subject,
        directory=directory,
        config=config,
        student=student,
        pixels=setup.pixels(config),
        teacher=None,
        result=result,
    )


def _config(directory: Path) -> resolved.Config:
    """Returns the config of a finished run; raises ExportError if there is none."""
    settings = workdir.settings(directory)
    try:
        return resolved.resolve(config_lib.from_dict(settings))
    except ValueError as error:
        raise errors.ExportError(f"{directory / workdir.CONFIG}: {error}") from error


def past(
    subject: Subject, steps: Collection[int] | None = None
) -> Iterator[tuple[int, PyTree]]:
    """Yields (step, the student's variables) for every remaining checkpoint.

    The variables fit `subject.student.model`: the gates of virtual attention, which
    only checkpoints have, are folded into the convolutions. `steps` selects some.
    """
    folder = subject.directory / workdir.CHECKPOINTS
    model = subject.student.model.clone(vam=setup.vam_options(subject.config))
    for step in checkpoint.list_steps(folder):
        if steps is not None and step not in steps:
            continue
        _, arrays, _ = checkpoint.read_arrays(folder, step)
        averaged = subject.config.optim.ema_used
        student = part(arrays, "student", averaged=averaged)
        yield step, vam.deployed(model, student)[1]


def part(arrays: dict[str, np.ndarray], name: str, *, averaged: bool = False) -> PyTree:
    """Returns the variables of the student or of the method ("student", "method").

    Args:
        arrays: a checkpoint's arrays by key, "train/params/student/stem/conv/kernel".
        name: "student" or "method".
        averaged: whether their moving average, if there is one, takes their place.
    """
    leaves, average = {}, {}
    for key, array in arrays.items():
        tree, *path = key.split("/")
        if tree == "train" and path[1:2] == [name] and path[0] not in _NO_VARIABLES:
            leaves[path[0], *path[2:]] = array
        if tree == "train" and path[0] == "average" and path[2:3] == [name]:
            average[path[1], *path[3:]] = array
    return flax.traverse_util.unflatten_dict(leaves | (average if averaged else {}))


def observe(
    model: chain.Chain,
    variables: PyTree,
    pixels: spec_lib.Pixels,
    images: np.ndarray,
    joints: tuple[str, ...],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Computes logits (n, classes) and activations at `joints` (n, H, W, C).

    Args:
        model: the network.
        variables: its variables.
        pixels: converts uint8 images to its input.
        images: (n, H, W, 3) uint8, processed in batches; the last batch is padded, so
            that a single compiled program suffices.
        joints: names of the joints.
    """

    @jax.jit
    def run(variables: PyTree, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        outputs: Any = model.apply(variables, pixels(images), train=False)
        return outputs.logits, [chain.feature_at(outputs, model, j) for j in joints]

    parts = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        padded = np.concatenate([batch, np.repeat(batch[:1], BATCH - len(batch), 0)])
        parts.append(jax.device_get(run(variables, padded)))
    count = len(images)
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)
