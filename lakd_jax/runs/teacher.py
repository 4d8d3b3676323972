"""Makes the teacher of a run: loads or trains it, folds it, and tests it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax import errors, paths
from lakd_jax.config import resolved
from lakd_jax.interop import weights
from lakd_jax.models import folding
from lakd_jax.runs import single, teacher_source
from lakd_jax.runtime import hosts
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import manifest, workdir
from lakd_jax.training import evaluate, phase, setup
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib


def make(config: resolved.Config, environment: single.Environment) -> single.Teacher:
    """Loads the teacher from `teacher.init` or the cache, or trains it; then tests it.

    Raises:
      errors.TeacherError: it cannot be loaded, or its accuracy on the test split
        is below `teacher.floor` (0: twice chance).
      errors.ConfigError: its stored outputs would exceed `teacher.views_mib`.
    """
    loaded = single.load_network("teacher", config, environment)
    pixels = _pixels(config, loaded)
    teacher_source.require_room(
        config, loaded, pixels, environment.dataset, environment.mesh
    )
    if not config.teacher.init:
        _train_teacher(config, environment)
        cached = str(_cached(config, environment))
        loaded = single.load_network("teacher", config, environment, cached)
    pixels, digest = _pixels(config, loaded), manifest.digest(loaded.variables)
    loaded, parameters = _frozen(config, loaded, environment)
    evaluator = single.evaluator(config, loaded, pixels, environment)
    predicted = evaluator.predict(loaded.variables, environment.test)
    score, answers = predicted.score, predicted.logits.argmax(-1)
    environment.notify(
        f"teacher {config.teacher.name} from {loaded.source}: {score.right} of "
        f"{score.examples} test images right ({100 * score.accuracy:.2f} %)"
    )
    _check_floor(config, environment, loaded, pixels, score)
    return single.Teacher(loaded, pixels, score, parameters, digest, answers)


def require_same(directory: Path, teacher: single.Teacher) -> None:
    """Records the teacher's weights when a run starts; checks them when it resumes.

    Raises:
      errors.TeacherError: the weights differ from those at the start.
    """
    now = {"weights": teacher.digest, "source": teacher.network.source}
    file = directory / workdir.TEACHER
    if not file.exists():
        workdir.write_json(file, now)
        return
    then = workdir.read_json(file)
    if then["weights"] != now["weights"]:
        raise errors.TeacherError(
            f"teacher.init: {now['source']} has other weights ({now['weights']}) than "
            f"{directory} was started with ({then['weights']}, from {then['source']})."
            "\nRestore the old ones, or use another --workdir."
        )


def _pixels(config: resolved.Config, loaded: weights.Loaded) -> spec_lib.Pixels:
    """Returns the normalisation and size of the images that the teacher takes."""
    return spec_lib.Pixels(
        config.teacher.mean or loaded.mean or config.data.mean,
        config.teacher.std or loaded.std or config.data.std,
        setup.pixels(config).dtype,
        config.teacher.image_size or loaded.size,
    )


def _frozen(
    config: resolved.Config,
    loaded: weights.Loaded,
    environment: single.Environment,
) -> tuple[weights.Loaded, int]:
    """Returns the teacher, folded and on all devices, and its parameter count."""
    model: Any = loaded.model
    variables: Any = loaded.variables
    parameters = state_lib.parameter_count(variables["params"])
    if config.teacher.fold:
        model, variables = folding.fold(model, variables)
    hosts.agree_on_arrays("the teacher", variables)
    variables = mesh_lib.replicate(variables, environment.mesh)
    return dataclasses.replace(loaded, model=model, variables=variables), parameters


def stand_in(
    config: resolved.Config, environment: single.Environment
) -> single.Teacher | None:
    """Returns a teacher with random weights for a dry run; None if one is available."""
    trained = _cached(config, environment) / workdir.RESULT
    if config.teacher.init or hosts.first(trained.exists):
        return None
    loaded = single.load_network("teacher", config, environment)
    images = jnp.zeros((1, *environment.dataset.train.shape), jnp.float32)
    variables = loaded.model.init(jax.random.key(0), images, train=False)
    loaded = dataclasses.replace(loaded, variables=variables)
    loaded, parameters = _frozen(config, loaded, environment)
    environment.notify(
        f"teacher {config.teacher.name}: random weights stand in for training"
    )
    pixels = dataclasses.replace(setup.pixels(config), size=config.teacher.image_size)
    return single.Teacher(
        loaded, pixels, evaluate.Score(0, 1, float("nan")), parameters
    )


def _cached(config: resolved.Config, environment: single.Environment) -> Path:
    """Returns the folder of the teacher that this config trains on these images."""
    key = resolved.of_teacher(config).digest()
    # The images of a folder may have changed.
    images = environment.dataset.fingerprint()[:6]
    cache = paths.local(config.teacher.cache, "teacher.cache")
    return cache / f"{config.teacher.name}-{key}-{images}"


def _train_teacher(config: resolved.Config, environment: single.Environment) -> None:
    """Trains the config's teacher into the cache, unless it is already there."""
    directory = _cached(config, environment)
    teacher_config = resolved.of_teacher(config)
    if hosts.first((directory / workdir.RESULT).exists):
        return
    environment.notify(f"{config.teacher.name}, the teacher, in {directory}")
    with single.prepare(directory, teacher_config):
        single.train_one(phase.Phase(teacher_config), directory, environment, None)


def _check_floor(
    config: resolved.Config,
    environment: single.Environment,
    loaded: weights.Loaded,
    pixels: spec_lib.Pixels,
    score: evaluate.Score,
) -> None:
    # With two classes, twice chance would be 100 %.
    floor = config.teacher.floor or min(2 / len(environment.dataset.classes), 0.75)
    if score.accuracy >= floor:
        return
    raise errors.TeacherError(
        f"teacher.init: {loaded.source} gets {score.right} of {score.examples} test "
        f"images right ({100 * score.accuracy:.2f} %), less than the "
        f"{100 * floor:.2f} % required (teacher.floor, or twice chance).\n"
        f"It was fed images with mean {_short(pixels.mean)} and deviation "
        f"{_short(pixels.std)}; if it was trained with others, set teacher.mean and "
        "teacher.std."
    )


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
