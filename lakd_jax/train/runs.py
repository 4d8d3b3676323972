"""A run from its config: data, teacher, training, and what is left on disk."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax import backend, data, distill, errors, hosts, interrupt, workdir
from lakd_jax import config as config_lib
from lakd_jax.data import order
from lakd_jax.models import folding
from lakd_jax.report import table
from lakd_jax.train import build, evaluate, fit, gates, hme_stages, networks
from lakd_jax.train import learner as learner_lib
from lakd_jax.train import state as state_lib

PyTree = Any
Notify = Callable[[str], None]

STEPS_PER_DISPATCH = 50  # on accelerators, where a dispatch costs what a step does


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs of one command share: the data and the devices."""

    dataset: data.Dataset
    test: state_lib.Resident
    mesh: jax.sharding.Mesh
    guard: interrupt.Guard
    notify: Notify


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network that has proved its worth on the test split."""

    network: networks.Loaded  # variables replicated over the devices
    pixels: learner_lib.Pixels
    score: evaluate.Score
    parameters: int  # before its batch norms were folded


def bench(
    config: config_lib.ConfigDict, guard: interrupt.Guard, notify: Notify
) -> Bench:
    """Loads the data that `config` names."""
    d = config.data
    load = functools.partial(
        data.load,
        d.source,
        image_size=d.image_size,
        minival=d.minival,
        data_dir=d.data_dir,
    )
    # A download may take long, and two of them into one folder would clash.
    dataset = guard.run(hosts.in_turn, load)
    hosts.agree({f"images of data.source {d.source}": data.fingerprint(dataset)})
    if len(dataset.train) < config.batch_size:
        raise errors.DataError(
            f"data.source {d.source}: {len(dataset.train)} training images "
            f"do not fill one batch; lower batch_size ({config.batch_size})."
        )
    mesh = state_lib.data_mesh()
    test = state_lib.resident(dataset.test, 0, mesh)
    return Bench(dataset, test, mesh, guard, notify)


def train_one(
    config: config_lib.ConfigDict,
    directory: Path,
    bench: Bench,
    teacher: Teacher | None,
    stage: hme_stages.Stage | None = None,
) -> dict[str, Any]:
    """Trains `config`'s student in `directory`, or goes on, or returns its result.

    `directory` has been prepared for this config (`workdir.prepare`). Leaves
    `metrics.jsonl`, `checkpoints/`, `student.safetensors` (the plain student, as
    of the last epoch) and `result.json` there. In stage 1 of an HME (see `hme_runs`)
    the student is that of the best epoch on minival, if there is a minival.
    """
    done = directory / networks.RESULT_FILE
    if hosts.first(done.exists):
        return hosts.first(lambda: workdir.read_json(done))
    job, student = assemble(config, directory, bench, teacher, stage)
    student, trained = _deployed(student, job.run())
    result = _result(config, bench, teacher, student, trained, job)
    kept = trained.last
    if stage:
        best = stage.number == 1 and trained.best is not None
        kept = trained.best if best else kept
        result["kept_step"] = result["best_step"] if best else job.plan.total_steps
        result |= stage.told
    pixels = build.pixels(config)
    height, width, _ = bench.dataset.train.images.shape[1:]
    seen = dataclasses.replace(
        student,
        mean=pixels.mean,
        std=pixels.std,
        size=pixels.size or (height if height == width else 0),
    )

    def leave() -> dict[str, Any]:
        networks.save(directory / networks.STUDENT_FILE, kept, seen, result)
        workdir.write_json(done, result)
        return result

    return hosts.first(leave)


def _deployed(
    student: networks.Loaded, trained: fit.Trained
) -> tuple[networks.Loaded, fit.Trained]:
    """Both as `gates.deployed` has them: what is tested is what is given out."""
    model, last = gates.deployed(student.model, trained.last)
    best = trained.best and gates.deployed(student.model, trained.best)[1]
    student = dataclasses.replace(student, model=model)
    return student, dataclasses.replace(trained, last=last, best=best)


def assemble(
    config: config_lib.ConfigDict,
    directory: Path,
    bench: Bench,
    teacher: Teacher | None,
    stage: hme_stages.Stage | None = None,
) -> tuple[fit.Fit, networks.Loaded]:
    """The training loop of a config, ready to run, and its student."""
    if not distill.METHODS[config.method].needs_teacher:
        teacher = None
    student = load_network("student", config, bench)
    student = gates.gated(student, build.vam_options(config))
    _check_last_batch(config, len(bench.dataset.train))
    plan = _plan(config, directory, len(bench.dataset.train))
    learner, first_state = build.learner(
        config,
        student,
        teacher.network if teacher else None,
        teacher_pixels=teacher.pixels if teacher else build.pixels(config),
        image_shape=bench.dataset.train.images.shape[1:],
        steps_per_epoch=plan.steps_per_epoch,
        mesh=bench.mesh,
        stage=stage,
    )
    minival = bench.dataset.minival
    job = fit.Fit(
        plan,
        learner,
        first_state,
        build.engine(
            config,
            learner,
            teacher.network.variables if teacher else None,
            state_lib.resident(bench.dataset.train, config.seed, bench.mesh),
            bench.guard.run,
        ),
        state_lib.resident(minival, config.seed, bench.mesh) if minival else None,
        evaluator(config, student, build.pixels(config), bench),
        bench.guard,
    )
    return job, student


def load_network(
    part: str, config: config_lib.ConfigDict, bench: Bench
) -> networks.Loaded:
    """The student or the teacher (`part`) that the config describes."""
    block = config[part]
    loaded = networks.load(
        part,
        block.name,
        block.init,
        shortcut=block.shortcut,
        dtype=config.dtype,
        num_classes=len(bench.dataset.classes),
        options=build.network_options(config) if part == "student" else {},
    )
    if loaded.remark:
        bench.notify(f"{part}.init: {loaded.source}: {loaded.remark}")
    return loaded


def make_teacher(config: config_lib.ConfigDict, bench: Bench) -> Teacher:
    """The teacher: from `teacher.init`, the cache, or trained now; then tested.

    Raises:
      errors.TeacherError: it cannot be loaded, or its accuracy on the test split
        is below `teacher.floor` (0: twice chance).
    """
    if not config.teacher.init:
        _train_teacher(config, bench)
        cached = str(_cached(config, bench))
        config = config_lib.changed(config, {"teacher.init": cached})
    loaded = load_network("teacher", config, bench)
    pixels = learner_lib.Pixels(
        tuple(config.teacher.mean or loaded.mean or config.data.mean),
        tuple(config.teacher.std or loaded.std or config.data.std),
        build.pixels(config).dtype,
        config.teacher.image_size or loaded.size,
    )
    loaded, parameters = _frozen(config, loaded, bench)
    score = evaluator(config, loaded, pixels, bench)(loaded.variables, bench.test)
    bench.notify(
        f"teacher {config.teacher.name} from {loaded.source}: {score.right} of "
        f"{score.examples} test images right ({100 * score.accuracy:.2f} %)"
    )
    _check_floor(config, bench, loaded, pixels, score)
    return Teacher(loaded, pixels, score, parameters)


def _frozen(
    config: config_lib.ConfigDict, loaded: networks.Loaded, bench: Bench
) -> tuple[networks.Loaded, int]:
    """A teacher made ready for inference on all devices, and its parameter count."""
    model: Any = loaded.model
    variables: Any = loaded.variables
    parameters = state_lib.parameter_count(variables["params"])
    if config.teacher.fold:
        model, variables = folding.fold(model, variables)
    hosts.agree_on_arrays("the teacher", variables)
    variables = state_lib.replicate(variables, bench.mesh)
    return dataclasses.replace(loaded, model=model, variables=variables), parameters


def stand_in(config: config_lib.ConfigDict, bench: Bench) -> Teacher | None:
    """For a dry run: a teacher of random weights, if it would be trained first."""
    trained = _cached(config, bench) / networks.RESULT_FILE
    if config.teacher.init or hosts.first(trained.exists):
        return None
    loaded = load_network("teacher", config, bench)
    images = jnp.zeros((1, *bench.dataset.train.images.shape[1:]), jnp.float32)
    variables = loaded.model.init(jax.random.key(0), images, train=False)
    loaded = dataclasses.replace(loaded, variables=variables)
    loaded, parameters = _frozen(config, loaded, bench)
    bench.notify(f"teacher {config.teacher.name}: random weights stand in for training")
    pixels = dataclasses.replace(build.pixels(config), size=config.teacher.image_size)
    return Teacher(loaded, pixels, evaluate.Score(0, 1, float("nan")), parameters)


def _cached(config: config_lib.ConfigDict, bench: Bench) -> Path:
    """Where the teacher that this config would train on these images is kept."""
    key = config_lib.digest(config_lib.teacher_config(config))
    images = data.fingerprint(bench.dataset)[:6]  # a folder may have changed
    return Path(config.teacher.cache) / f"{config.teacher.name}-{key}-{images}"


def _train_teacher(config: config_lib.ConfigDict, bench: Bench) -> None:
    """Trains the config's teacher into the cache, unless it is there."""
    directory, own = _cached(config, bench), config_lib.teacher_config(config)
    if hosts.first((directory / networks.RESULT_FILE).exists):
        return
    bench.notify(f"{config.teacher.name}, the teacher, in {directory}")
    with workdir.prepare(directory, config_lib.to_dict(own)):
        train_one(own, directory, bench, None)


def _check_floor(
    config: config_lib.ConfigDict,
    bench: Bench,
    loaded: networks.Loaded,
    pixels: learner_lib.Pixels,
    score: evaluate.Score,
) -> None:
    # Of two classes, twice chance would be every image.
    floor = config.teacher.floor or min(2 / len(bench.dataset.classes), 0.75)
    if score.accuracy >= floor:
        return
    raise errors.TeacherError(
        f"teacher.init: {loaded.source} gets {score.right} of {score.examples} test "
        f"images right ({100 * score.accuracy:.2f} %), less than the "
        f"{100 * floor:.2f} % asked for (teacher.floor, or twice chance).\n"
        f"It was fed images with mean {_short(pixels.mean)} and deviation "
        f"{_short(pixels.std)}; if it was trained with others, set teacher.mean and "
        "teacher.std."
    )


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"


def evaluator(
    config: config_lib.ConfigDict,
    network: networks.Loaded,
    pixels: learner_lib.Pixels,
    bench: Bench,
) -> evaluate.Evaluator:
    """Counts right answers of a network on resident splits."""
    return evaluate.Evaluator(
        network.model,
        pixels,
        config.eval_batch_size,
        bench.mesh,
        check=bench.guard.check,
        compile_with=bench.guard.run,
    )


def _check_last_batch(config: config_lib.ConfigDict, examples: int) -> None:
    """Raises ConfigError where an epoch's short last batch is too short to normalise.

    A whole batch is checked with the other fields, before there are any data.
    """
    least = distill.METHODS[config.method].least_batch
    left = examples % config.batch_size
    if left == 0 or left >= least or config.data.drop_last:
        return
    raise errors.ConfigError(
        [
            f"batch_size is {config.batch_size}, which leaves {left} of {examples} "
            f"training images for the last batch of an epoch; method {config.method} "
            f"needs at least {least}: set data.drop_last, or another batch_size"
        ]
    )


def _plan(config: config_lib.ConfigDict, directory: Path, examples: int) -> fit.Plan:
    steps_per_epoch = order.steps_per_epoch(
        examples, config.batch_size, config.data.drop_last
    )
    one = backend.on_cpu() or config.local.engine != "fused"
    several = 1 if one else STEPS_PER_DISPATCH
    return fit.Plan(
        workdir=directory,
        seed=config.seed,
        batch_size=config.batch_size,
        drop_last=config.data.drop_last,
        examples=examples,
        epochs=config.epochs,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.checkpoint.every_steps or steps_per_epoch,
        steps_per_dispatch=config.steps_per_dispatch or several,
        keep=config.checkpoint.keep,
    )


def _result(
    config: config_lib.ConfigDict,
    bench: Bench,
    teacher: Teacher | None,
    student: networks.Loaded,
    trained: fit.Trained,
    job: fit.Fit,
) -> dict[str, Any]:
    """What result.json holds; the test split is looked at here and only here."""
    score = evaluator(config, student, build.pixels(config), bench)
    ledger = trained.ledger
    end, top = job.plan.total_steps, ledger.best_step
    last = score(trained.last, bench.test, job.temperature(end))
    best = None
    if trained.best:
        best = score(trained.best, bench.test, job.temperature(top))
    return {
        "method": config.method,
        "student": config.student.name,
        "teacher": config.teacher.name if teacher else None,
        "classes": len(bench.dataset.classes),
        "class_names": list(bench.dataset.classes),
        "image_shape": list(bench.dataset.train.images.shape[1:]),
        "data": data.fingerprint(bench.dataset),
        "seed": config.seed,
        "epochs": config.epochs,
        "test_last": _counts(last),
        "test_best_on_minival": _counts(best) if best else None,
        "best_step": ledger.best_step,
        "teacher_test": _counts(teacher.score) if teacher else None,
        "parameters": state_lib.parameter_count(trained.last["params"]),
        "seconds": ledger.seconds,
        "step_seconds": ledger.step_seconds,
        "images_per_second": trained.images_per_second,
        "device": jax.devices()[0].device_kind,
    }


def _counts(score: evaluate.Score) -> dict[str, Any]:
    return {
        "right": score.right,
        "examples": score.examples,
        "accuracy": score.accuracy,
        "loss": score.loss,
    }


def row(result: dict[str, Any], name: str) -> table.Row:
    """A finished run as a line of the final table."""
    best = result["test_best_on_minival"]
    return table.Row(
        name=name,
        test_last=result["test_last"]["accuracy"],
        test_best=best["accuracy"] if best else None,
        examples=result["test_last"]["examples"],
        parameters=result["parameters"],
        seconds=result["seconds"] + result.get("stage1", {"seconds": 0})["seconds"],
        images_per_second=result["images_per_second"],
    )


def teacher_row(config: config_lib.ConfigDict, teacher: Teacher) -> table.Row:
    """The teacher as a line of the final table."""
    return table.Row(
        name=f"{config.teacher.name}, teacher",
        test_last=teacher.score.accuracy,
        test_best=None,
        examples=teacher.score.examples,
        parameters=teacher.parameters,
        seconds=None,
        images_per_second=None,
    )
