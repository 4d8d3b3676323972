"""Gives a student the teacher's classifier, for methods with `borrows_head`."""

import dataclasses
from typing import Any

import flax
import numpy as np

from lakd_jax import distill, errors
from lakd_jax.config import resolved
from lakd_jax.interop import weights
from lakd_jax.models import chain, ensemble, heads, projector
from lakd_jax.training import spec as spec_lib


def student(
    config: resolved.Config,
    loaded: weights.Loaded,
    teacher: weights.Loaded | None,
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> weights.Loaded:
    """Returns the student as the method of the run trains it.

    For most methods it is as loaded. With `borrows_head` its head is a projector, whose
    variables are drawn unless its file has them, and the teacher's classifier.

    Args:
      config: the resolved config.
      loaded: the student, from a file or not.
      teacher: None for methods without one.
      sizes: height and width of the student's and of the teacher's images.

    Raises:
      errors.TeacherError: the file of the student has another head of this kind; or the
        teacher does not end in one linear layer.
    """
    name, found = distill.facts(config.method).borrower, loaded.model.projector
    if not name or teacher is None:
        if found is None:
            return loaded
        raise errors.TeacherError(
            f"student.init: {loaded.source} has a projector and its teacher's "
            f"classifier, which method {config.method} cannot train: start from other "
            "weights, or use method simkd"
        )
    options = _options(config.methods[name]["factor"], loaded.model, teacher, sizes)
    if found not in (None, options):
        raise errors.TeacherError(
            f"student.init: {loaded.source} has a projector for another teacher or "
            f"factor ({found}, not {options}): start from other weights"
        )
    model = loaded.model.clone(projector=options)
    return dataclasses.replace(
        loaded, model=model, variables=_variables(model, loaded.variables, teacher)
    )


def sizes(
    student: spec_lib.Pixels, teacher: spec_lib.Pixels, image_shape: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns height and width of both networks' images, as `student` takes them."""
    height, width = image_shape[:2]

    def of(pixels: spec_lib.Pixels) -> tuple[int, int]:
        return (pixels.size, pixels.size) if pixels.size else (height, width)

    return of(student), of(teacher)


def _options(
    factor: int,
    model: chain.Chain,
    teacher: weights.Loaded,
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> projector.Options:
    """Returns the projector between both networks' maps."""
    shape = heads.map_shape(teacher.model, *sizes[1])
    assert shape is not None  # by the rules of the method
    theirs, width = shape[:2], shape[-1]
    draft = projector.Options(width, max(width // factor, 1))
    # A projector keeps the size of the map that it gets.
    found: Any = heads.map_shape(model.clone(projector=draft), *sizes[0])
    ours = found[:2]
    small = min(ours[0], theirs[0]), min(ours[1], theirs[1])
    return dataclasses.replace(draft, pooled=() if small == ours else small)


def _variables(
    model: chain.Chain, given: Any, teacher: weights.Loaded
) -> dict[str, Any]:
    """Returns those of the given variables that the student has, and the teacher's."""
    paths = flax.traverse_util.flatten_dict(chain.variable_shapes(model))
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(given or {})
    kept = {path: array for path, array in flat.items() if path in paths}
    matrix, bias = heads.classifier(*ensemble.first(teacher.model, teacher.variables))
    where = "params", "head", projector.BORROWED
    kept |= {(*where, "kernel"): np.asarray(matrix), (*where, "bias"): np.asarray(bias)}
    return flax.traverse_util.unflatten_dict(kept)
