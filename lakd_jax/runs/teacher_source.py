"""Applies a config's `teacher.views`: chooses the source of teacher outputs."""

import dataclasses
import pathlib
from typing import Any

import jax

from lakd_jax import data, distill, paths
from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.data.streaming import batches
from lakd_jax.interop import weights
from lakd_jax.models import chain
from lakd_jax.runs import teacher_cache
from lakd_jax.runtime import interrupt
from lakd_jax.training import feeds, setup, teacher_outputs
from lakd_jax.training import spec as spec_lib

PyTree = Any


def source(
    config: resolved.Config,
    spec: spec_lib.StepSpec,
    variables: PyTree,
    device_data: device.DeviceData | feeds.Run,
    dataset: data.Dataset | batches.Dataset,
    *,
    guard: interrupt.Guard,
    notify: teacher_cache.Notify,
    folder: pathlib.Path = pathlib.Path(),
    dry: bool,
) -> teacher_outputs.Source:
    """Returns the source of teacher outputs: the teacher itself, or stored outputs.

    Args:
      config: resolved.
      spec: of the run's steps.
      variables: of the teacher as it is run, on all devices; None without one.
      device_data: the training images, with the random keys of the run's seed.
      dataset: whose `train` these images are.
      guard: is checked for interruptions.
      notify: receives lines of console output.
      folder: where a relative `teacher.cache` starts.
      dry: zeros replace stored outputs, and nothing is written.

    Raises:
      errors.ConfigError: stored outputs would exceed `teacher.views_mib`.
      errors.LakdError: see `teacher_cache.kept`.
    """
    if not spec.views:
        return variables
    # `rules_of_runs` refuses streamed images with `teacher.views`.
    assert isinstance(device_data, device.DeviceData)
    assert isinstance(dataset, data.Dataset)
    computer = teacher_cache.OutputsComputer(
        spec, variables, device_data, config.eval_batch_size, guard
    )
    shapes = computer.shapes()
    teacher_cache.require_room(shapes, config.teacher.views_mib)
    if dry:
        notify("teacher.views: zeros stand in for the teacher's outputs")
        return teacher_cache.blank(shapes, spec.mesh)
    key = teacher_cache.settings(
        spec,
        variables,
        shapes,
        teacher=config.teacher.name,
        data=dataset.fingerprint(),
        seed=config.seed,
    )
    cache = paths.place(config.teacher.cache, "teacher.cache", folder)
    return teacher_cache.kept(cache, computer, key, dataset.train.labels, notify)


def require_room(
    config: resolved.Config,
    teacher: weights.Loaded,
    pixels: spec_lib.Pixels,
    dataset: data.Dataset | batches.Dataset,
    mesh: jax.sharding.Mesh,
) -> None:
    """Raises errors.ConfigError if stored outputs would exceed their limit.

    Checks all methods that will run. It does not need the teacher's weights, so the
    check comes before the teacher is trained.
    """
    if not config.teacher.views:
        return
    variable_shapes = chain.variable_shapes(teacher.model)
    image_shape = dataset.train.shape
    for method in (config.method, *config.baselines):
        if not distill.facts(method).needs_teacher:
            continue
        spec, _ = setup.spec(
            dataclasses.replace(config, method=method),
            _any_student(config, len(dataset.classes), max(image_shape[:2])),
            dataclasses.replace(teacher, variables=variable_shapes),
            teacher_pixels=pixels,
            image_shape=image_shape,
            steps_per_epoch=1,
            examples=len(dataset.train),
            mesh=mesh,
        )
        shapes = teacher_cache.shapes(
            spec, variable_shapes, image_shape, len(dataset.train)
        )
        teacher_cache.require_room(shapes, config.teacher.views_mib)


def _any_student(
    config: resolved.Config, classes: int, data_size: int
) -> weights.Loaded:
    """Returns the config's student without weights, which do not affect its cuts."""
    return weights.load(
        "student",
        config.student.name,
        "",
        dtype=config.dtype,
        num_classes=classes,
        options=setup.network_options(config),
        image_size=config.student.image_size,
        data_size=data_size,
    )
