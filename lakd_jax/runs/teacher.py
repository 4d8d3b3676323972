"""Makes the teacher of a run: loads or trains it, folds it, and tests it.

`load_recorded` loads the teacher of a finished run again.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax import distill, errors, models, paths
from lakd_jax.config import resolved
from lakd_jax.interop import published, weights
from lakd_jax.models import ensemble, folding
from lakd_jax.report import evaluation
from lakd_jax.runs import (
    phase_run,
    single,
    teacher_floor,
    teacher_source,
    teachers,
)
from lakd_jax.runtime import hosts
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir
from lakd_jax.training import evaluate, phase, setup
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib


def make(config: resolved.Config, environment: single.Environment) -> single.Teacher:
    """Loads the teacher from `teacher.init` or the cache, or trains it; then tests it.

    A teacher of other classes than the data's is not tested, and serves only methods
    that read none of its logits. Several (`teachers`) are tested each, and together.

    Raises:
      errors.TeacherError: it cannot be loaded, its accuracy on the test split is below
        `teacher.floor`, or a method needs it to have the data's classes.
      errors.ConfigError: its stored outputs would exceed `teacher.views_mib`.
    """
    if not config.teachers:
        return _make_one(config, environment)
    found = []
    for i, one in enumerate(teachers.configs(config)):
        with teachers.named(i):
            found.append(_make_one(one, environment, of_several=True))
    teacher = teachers.joined(config, found)
    _require_room(config, teacher.network, teacher.pixels, environment)
    predicted = _tested(config, environment, teacher.network, teacher.pixels)
    answers = predicted.logits.argmax(-1)
    return dataclasses.replace(teacher, score=predicted.score, answers=answers)


def _make_one(
    config: resolved.Config,
    environment: single.Environment,
    *,
    of_several: bool = False,
) -> single.Teacher:
    """Makes the teacher of `config.teacher`; each of several has the data's classes."""
    loaded = single.load_network("teacher", config, environment)
    if of_several and loaded.difference:
        raise errors.TeacherError(weights.other_classes("teacher", loaded))
    _require_classes(config, loaded)
    pixels = _pixels(config, loaded)
    _require_room(config, loaded, pixels, environment)
    if loaded.variables is None:
        _train_teacher(config, environment)
        cached = str(_cached(config, environment))
        loaded = single.load_network("teacher", config, environment, cached)
        pixels = _pixels(config, loaded)
    loaded, parameters = _frozen(config, loaded, environment)
    score, answers = None, None
    if loaded.difference:
        environment.notify(
            f"teacher {config.teacher.name} from {loaded.source} has other classes "
            "than the data: it is not tested, and only its features are compared"
        )
    else:
        predicted = _tested(config, environment, loaded, pixels)
        score, answers = predicted.score, predicted.logits.argmax(-1)
    return single.Teacher(loaded, pixels, score, parameters, loaded.digest, answers)


def _require_room(
    config: resolved.Config,
    loaded: weights.Loaded,
    pixels: spec_lib.Pixels,
    environment: single.Environment,
) -> None:
    dataset = single.seen(config, environment.dataset)
    teacher_source.require_room(config, loaded, pixels, dataset, environment.mesh)


def _tested(
    config: resolved.Config,
    environment: single.Environment,
    loaded: weights.Loaded,
    pixels: spec_lib.Pixels,
) -> evaluate.Predictions:
    """Tests the teacher on the test split; raises TeacherError below the floor."""
    evaluator = single.evaluator(config, loaded, pixels, environment)
    predicted = evaluator.predict(loaded.variables, environment.test)
    score = predicted.score
    environment.notify(
        f"teacher {config.teacher_title} from {loaded.source}: {score.right} of "
        f"{score.examples} test images right ({100 * score.accuracy:.2f} %)"
        f"{_published(loaded)}"
    )
    classes = environment.dataset.classes
    confusion = evaluation.confusion(predicted.logits, predicted.labels)
    if fault := teacher_floor.fault(config.teacher.floor, confusion):
        raise errors.TeacherError(
            f"{_field(loaded)}: {loaded.source} gets {score.right} of {score.examples} "
            f"test images right ({100 * score.accuracy:.2f} %), {fault}.\n"
            f"It was fed images with mean {_short(pixels.mean)} and deviation "
            f"{_short(pixels.std)}; if it was trained with others, set teacher.mean "
            f"and teacher.std.{teacher_floor.other_order(confusion, classes)}"
        )
    return predicted


def _field(loaded: weights.Loaded) -> str:
    """Returns the field that a teacher comes from."""
    if isinstance(loaded.model, ensemble.Ensemble):
        return "teachers"
    return "teacher.name" if loaded.source == weights.FUNCTION else "teacher.init"


def _published(loaded: weights.Loaded) -> str:
    """Returns the published accuracy, to be compared; "" if it is not known."""
    origin = loaded.origin
    if origin is None or not origin.accuracy:
        return ""
    return f"; published: {100 * origin.accuracy:.2f} % on {origin.data}"


def _require_classes(config: resolved.Config, loaded: weights.Loaded) -> None:
    """Raises TeacherError if a method reads the logits of a teacher of other classes.

    Methods that read only its features can use it.
    """
    methods = (config.method, *config.baselines)
    readers = [m for m in methods if distill.facts(m).reads_classes]
    if not (loaded.difference and readers):
        return
    others = [
        name
        for name in distill.names()
        if distill.facts(name).needs_teacher and not distill.facts(name).reads_classes
    ]
    raise errors.TeacherError(
        f"{weights.other_classes('teacher', loaded)}\n"
        f"Method {readers[0]} reads the teacher's logits, which are of those classes. "
        f"Methods that read only features can use it: {', '.join(others)}."
    )


def load_recorded(
    directory: Path, config: resolved.Config, environment: single.Environment
) -> single.Teacher:
    """Loads the teacher that a run recorded; trains, evaluates and writes nothing.

    Its score is the recorded one.

    Args:
      directory: of the finished run, or of one of its seeds or baselines.
      config: of that run.
      environment: made with `workdir.folder(directory)`.

    Raises:
      errors.TeacherError: there is no record, or the teacher is missing or has other
        weights.
    """
    file = _record_of(directory)
    then = workdir.read_json(file)
    if config.teachers:
        alone = zip(teachers.configs(config), then["teachers"], strict=True)
        found = [_recorded(file, note, one, environment) for one, note in alone]
        teacher = teachers.joined(config, found)
    else:
        teacher = _recorded(file, then, config, environment)
    result = workdir.read_json(directory / workdir.RESULT)["teacher_test"]
    score = None
    if result and not teacher.network.difference:
        names = ("right", "examples", "loss")
        score = evaluate.Score(**{name: result[name] for name in names})
    return dataclasses.replace(teacher, score=score)


def _recorded(
    file: Path,
    then: Mapping[str, Any],
    config: resolved.Config,
    environment: single.Environment,
) -> single.Teacher:
    """Loads the teacher that `file` notes as `then`, without its score."""
    path = paths.place(then["source"], "source", workdir.folder(file.parent))
    if then["source"] == weights.FUNCTION:
        _require_registered(file, config)
    elif not path.exists():
        again = "restore it"
        if not config.teacher.init:
            again += ", or train it again by repeating the run's command"
        raise errors.TeacherError(
            f"{file}: the teacher of this run, {path} (weights {then['weights']}), "
            f"does not exist; {again}."
        )
    elif not published.is_name(config.teacher.init):
        # A name brings its normalisation along, so it is kept; its file is there.
        found = dataclasses.replace(config.teacher, init=str(path))
        config = dataclasses.replace(config, teacher=found)
    loaded = single.load_network("teacher", config, environment)
    if loaded.digest != then["weights"]:
        raise errors.TeacherError(
            f"{file}: the teacher of this run has the weights {then['weights']}, but "
            f"{loaded.source} now has others ({loaded.digest}); restore the old ones."
        )
    pixels = _pixels(config, loaded)
    loaded, parameters = _frozen(config, loaded, environment)
    return single.Teacher(loaded, pixels, None, parameters, loaded.digest)


def _require_registered(file: Path, config: resolved.Config) -> None:
    """Raises TeacherError if the function that was the teacher is not registered."""
    name = config.teacher.name
    if name not in models.names() or not models.family(name).WHOLE:
        raise errors.TeacherError(
            f"{file}: the teacher of this run, {name}, is a function that is not "
            "registered here: call lakd_jax.teacher_from as for the run, and then "
            "lakd_jax.load(...).report() or .evaluate() in the same process."
        )


def _record_of(directory: Path) -> Path:
    """Returns the teacher.json of a run; seeds and baselines have their command's."""
    for folder in (directory, *paths.absolute(directory).parents[:2]):
        if (folder / workdir.TEACHER).exists():
            return folder / workdir.TEACHER
    raise errors.TeacherError(
        f"{directory}: has no {workdir.TEACHER}, which says where its teacher is; "
        "repeat the run's command, which writes it."
    )


def require_same(directory: Path, teacher: single.Teacher) -> None:
    """Records the teacher's weights when a run starts; checks them when it resumes.

    Raises:
      errors.TeacherError: the weights differ from those at the start.
    """
    now = _note(teacher)
    file = directory / workdir.TEACHER
    if not file.exists():
        workdir.write_json(file, now)
        return
    then = workdir.read_json(file)
    pairs = [(f"{_field(teacher.network)}: ", then, now)]
    if teacher.members:
        notes = zip(then["teachers"], now["teachers"], strict=True)
        pairs = [(f"teachers[{i}]: ", *pair) for i, pair in enumerate(notes)]
    for where, before, after in pairs:
        if before["weights"] != after["weights"]:
            raise errors.TeacherError(
                f"{where}{after['source']} has other weights ({after['weights']}) than "
                f"{directory} was started with ({before['weights']}, from "
                f"{before['source']}).\nRestore the old ones, or use another --workdir."
            )


def _note(teacher: single.Teacher) -> dict[str, Any]:
    """Returns what teacher.json has about a teacher, or about several."""
    note: dict[str, Any] = {"weights": teacher.digest, "source": teacher.network.source}
    if origin := teacher.network.origin:
        note |= {"name": origin.name, "address": origin.address}
        note |= {"sha256": origin.sha256}
    if teacher.members:
        note["teachers"] = [_note(member) for member in teacher.members]
    return note


def _pixels(config: resolved.Config, loaded: weights.Loaded) -> spec_lib.Pixels:
    """Returns the normalisation and size of the images that the teacher takes."""
    return spec_lib.Pixels(
        config.teacher.mean or loaded.mean or config.data.mean,
        config.teacher.std or loaded.std or config.data.std,
        jnp.dtype("float32") if loaded.model.WHOLE else setup.pixels(config).dtype,
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
    if config.teacher.fold and not model.WHOLE:
        model, variables = folding.fold(model, variables)
    hosts.agree_on_arrays("the teacher", variables)
    variables = mesh_lib.replicate(variables, environment.mesh)
    return dataclasses.replace(loaded, model=model, variables=variables), parameters


def stand_in(
    config: resolved.Config, environment: single.Environment
) -> single.Teacher | None:
    """Returns a teacher with random weights for a dry run; None if one is available."""
    if config.teachers:
        return None
    trained = _cached(config, environment) / workdir.RESULT
    if config.teacher.init or hosts.first(trained.exists):
        return None
    loaded = single.load_network("teacher", config, environment)
    if loaded.variables is not None:  # of a function
        return None
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
    folder = environment.folder
    cache = paths.place(config.teacher.cache, "teacher.cache", folder)
    return cache / f"{config.teacher.name}-{key}-{images}"


def _train_teacher(config: resolved.Config, environment: single.Environment) -> None:
    """Trains the config's teacher into the cache, unless it is already there."""
    directory = _cached(config, environment)
    teacher_config = resolved.of_teacher(config)
    if hosts.first((directory / workdir.RESULT).exists):
        return
    environment.notify(f"{config.teacher.name}, the teacher, in {directory}")
    with contextlib.ExitStack() as stack:
        try:
            prepared = single.prepare(
                directory, teacher_config, folder=environment.folder
            )
        except errors.WorkdirError as error:
            raise errors.WorkdirError(
                f"teacher.cache: {str(error).splitlines()[0]}\nThe teacher is trained "
                "first and kept there: set teacher.cache to another folder."
            ) from error
        stack.enter_context(prepared)
        phase_run.train_one(phase.Phase(teacher_config), directory, environment, None)


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
