"""Draws the pictures at the end of a run: accuracy curves and attention maps."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from lakd_jax import data, distill
from lakd_jax.config import resolved
from lakd_jax.distill import lakd
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.report import maps, metrics, pictures
from lakd_jax.runs import single
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import setup

SHOWN = 8  # the most test images in the attention picture


def draw(
    config: resolved.Config,
    directory: Path,
    environment: single.Environment,
    teacher: single.Teacher | None,
    folders: Mapping[str, Path],
) -> None:
    """Writes curves.png, and attention.png if there is a teacher to compare with.

    One process alone calls this (see `hosts.first`), so it uses a single device.

    Args:
      directory: of the run whose student is drawn; the pictures are written there.
      folders: from titles to the directories of all runs of this command, for the
        curves.
    """
    records = {title: metrics.read(folder) for title, folder in folders.items()}
    pictures.curves(
        directory / "curves.png",
        records,
        teacher_accuracy=teacher.score.accuracy if teacher and teacher.score else None,
    )
    if teacher and teacher.network.model.stage_sizes:  # a function may give no maps
        student = single.load_network("student", config, environment, str(directory))
        path, preview = directory / "attention.png", environment.dataset.preview
        chosen = _one_per_class(preview.test.labels)
        attention(path, config, preview, student, teacher, chosen)


def attention(
    path: Path,
    config: resolved.Config,
    dataset: data.Dataset,
    student: weights.Loaded,
    teacher: single.Teacher,
    chosen: np.ndarray,
) -> None:
    """Draws both networks' attention maps of some test images, module by module.

    Args:
      path: of the picture.
      config: of the student's run.
      chosen: positions of the images in the test split.
    """
    test = dataset.test
    images = jax.numpy.asarray(test.images[chosen])
    of_teacher = _forward(teacher.network, teacher.pixels(images))
    of_student = _forward(student, setup.pixels(config)(images))
    parts = partition(config, student.model, teacher.network.model)
    options = lakd.Options(**config.method_options("lakd"))
    at_teacher = _joints(of_teacher, teacher.network.model, parts.teacher_joints)
    at_student = _joints(of_student, student.model, parts.student_joints)
    masks = [options.mask(z)[..., 0] for z in at_teacher]
    modules = [
        pictures.ModuleMaps(name, *map(np.asarray, columns))
        for name, *columns in zip(
            parts.names,
            maps.attention_maps(at_teacher),
            masks,
            maps.attention_maps(at_student),
            strict=True,
        )
    ]
    names = dataset.classes
    answers = [np.asarray(o.logits.argmax(-1)) for o in (of_teacher, of_student)]
    of_its_own = _names(teacher.network, names)
    captions = [
        pictures.Caption(names[label], of_its_own[theirs], names[ours])
        for label, theirs, ours in zip(test.labels[chosen], *answers, strict=True)
    ]
    pictures.attention(path, test.images[chosen], captions, modules)


def partition(
    config: resolved.Config, student: chain.Chain, teacher: chain.Chain
) -> cuts.Partition:
    """Returns the modules to compare: the run's own if its method trains by modules.

    Other methods get a single module, the whole network, where the two networks
    differ in their number of stages, or do not pair at the cuts of the config, which
    these methods do not use.
    """
    local, stages = config.local, (len(student.stage_sizes), len(teacher.stage_sizes))
    cut_at = (local.granularity, local.cuts, local.modules)
    if distill.facts(config.method).staged:
        return cuts.modules(student, teacher, *cut_at)
    if stages[0] == stages[1]:
        with contextlib.suppress(ValueError):
            return cuts.modules(student, teacher, *cut_at)
    return cuts.modules(student, teacher, "none", ())


def _one_per_class(labels: np.ndarray) -> np.ndarray:
    """Returns positions of the first images of up to `SHOWN` evenly spread classes."""
    classes = np.unique(labels)
    places = np.linspace(0, len(classes) - 1, min(SHOWN, len(classes)))
    return np.array([np.flatnonzero(labels == classes[int(p)])[0] for p in places])


def _forward(network: weights.Loaded, inputs: jax.Array) -> chain.Outputs:
    forward = jax.jit(lambda v, x: network.model.apply(v, x, train=False))
    # A single process cannot run a program on the devices of all processes.
    return forward(mesh_lib.on_one_device(network.variables), inputs)


def _names(teacher: weights.Loaded, of_data: Sequence[str]) -> Sequence[str]:
    """Returns the names of the teacher's classes, numbers if it has unknown ones."""
    if not teacher.difference:
        return of_data
    return teacher.classes or [f"class {k}" for k in range(teacher.model.num_classes)]


def _joints(
    outputs: chain.Outputs, model: chain.Chain, names: Sequence[str]
) -> list[jax.Array]:
    return [chain.feature_at(outputs, model, n) for n in names]
