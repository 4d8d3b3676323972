"""Makes what one phase of a run needs, from its config: data, networks, step, loop."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lakd_jax import data, distill, paths
from lakd_jax.config import resolved
from lakd_jax.data import dataset as dataset_lib
from lakd_jax.data import device, order, sources
from lakd_jax.data.streaming import batches
from lakd_jax.interop import downloads, published, weights
from lakd_jax.models import chain
from lakd_jax.runs import checks, teacher_source, tracking
from lakd_jax.runtime import backend, hosts, interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir
from lakd_jax.training import (
    borrowed,
    evaluate,
    feeds,
    loop,
    setup,
    teacher_outputs,
    updates,
)
from lakd_jax.training import engine as engine_lib
from lakd_jax.training import phase as phase_lib
from lakd_jax.training import record as record_lib
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib

PyTree = Any
Notify = Callable[[str], None]

STEPS_PER_DISPATCH = 50  # on accelerators, where a dispatch costs what a step does


@dataclasses.dataclass(frozen=True)
class Environment:
    """The data and devices that all runs of one command share.

    Attributes:
      train, minival, test: the splits of `dataset` on the devices of `mesh`, or
        streams that load them batch by batch.
      folder: where relative paths of the config start, see `workdir.folder`.
      root: the directory of the command; None for a single run, which is its own.
    """

    dataset: data.Dataset | batches.Dataset
    train: feeds.Data
    minival: feeds.Data | None
    test: feeds.Data
    mesh: jax.sharding.Mesh
    guard: interrupt.Guard
    notify: Notify
    folder: Path = Path()
    root: Path | None = None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen teacher, already evaluated on the test split.

    Attributes:
      network: its variables are replicated over the devices.
      score: None if its classes are not those of the data, so that it has none.
      parameters: counted before its batch norms were folded.
      digest: of its variables as their source has them.
      answers: (N,) the classes it predicts on the test split; None without a score.
      members: of several teachers (`teachers`), each alone; else ().
    """

    network: weights.Loaded
    pixels: spec_lib.Pixels
    score: evaluate.Score | None
    parameters: int
    digest: str = ""
    answers: np.ndarray | None = None
    members: "tuple[Teacher, ...]" = ()


def environment(
    config: resolved.Config,
    guard: interrupt.Guard,
    notify: Notify,
    folder: Path = Path(),
) -> Environment:
    """Loads the data that `config` names and places it on the devices.

    Relative paths start in `folder`, see `workdir.folder`.
    """
    d = config.data
    source = sources.located(d.source, folder)
    common = {
        "minival": d.minival,
        "data_dir": paths.within(folder, d.data_dir, "data.data_dir"),
        "test_share": d.test_share,
    }
    load = functools.partial(
        data.load,
        source,
        image_size=d.image_size,
        max_bad=d.max_bad,
        orientation=d.orientation,
        **common,
    )
    if d.streaming:
        views = batches.Views(d.image_size, d.crop_scale, d.test_resize, d.orientation)
        load = functools.partial(
            batches.load, source, views, workers=d.workers, **common
        )
    # A download may take long, and two processes must not write one folder at once.
    with guard.released():
        dataset = hosts.in_turn(load)
    hosts.agree({f"images of data.source {d.source}": dataset.fingerprint()})
    checks.a_batch(config, len(seen(config, dataset).train))
    loaded = on_mesh(dataset, mesh_lib.data_mesh(), guard, notify)
    return dataclasses.replace(loaded, folder=folder)


def on_mesh(
    dataset: data.Dataset | batches.Dataset,
    mesh: jax.sharding.Mesh,
    guard: interrupt.Guard,
    notify: Notify,
) -> Environment:
    """Returns the environment of `dataset` on the devices of `mesh`."""

    def placed(split: data.Split | batches.Streamed) -> feeds.Data:
        if isinstance(split, batches.Streamed):
            return feeds.Stream(split, mesh)
        return device.device_data(split, 0, mesh)

    train, test = placed(dataset.train), placed(dataset.test)
    minival = placed(dataset.minival) if dataset.minival else None
    return Environment(dataset, train, minival, test, mesh, guard, notify)


def of_student(config: resolved.Config, environment: Environment) -> Environment:
    """Returns the environment of a student from that of its teacher, see `seen`."""
    dataset = seen(config, environment.dataset)
    if dataset is environment.dataset:
        return environment
    assert isinstance(dataset, data.Dataset)  # see `seen`
    train = device.device_data(dataset.train, 0, environment.mesh)
    return dataclasses.replace(environment, dataset=dataset, train=train)


def seen(
    config: resolved.Config, dataset: data.Dataset | batches.Dataset
) -> data.Dataset | batches.Dataset:
    """Returns the data set with those images that a student sees (`data.per_class`)."""
    if not config.data.per_class or isinstance(dataset, batches.Dataset):
        return dataset  # the rules of the config do not allow both
    return dataset_lib.few(dataset, config.data.per_class, config.seed)


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """Everything a training needs except the engine that executes its steps.

    Attributes:
      source: where steps get the teacher's outputs from.
      data: the training split with the random keys of the run's seed.
    """

    phase: phase_lib.Phase
    record: record_lib.RunRecord
    spec: spec_lib.StepSpec
    student: weights.Loaded
    source: teacher_outputs.Source
    data: device.DeviceData | feeds.Run

    @property
    def config(self) -> resolved.Config:
        """Returns the config of the phase."""
        return self.phase.config


def prepare(
    directory: Path,
    config: resolved.Config,
    *,
    may_change: Sequence[str] = (),
    **options: Any,
) -> workdir.Workdir:
    """Locks the directory of a run of `config`; see `workdir.prepare`."""
    may_change = (*resolved.NO_RESULT, *may_change)
    return workdir.prepare(
        directory, config.to_dict(), may_change=may_change, **options
    )


def training_job(
    phase: phase_lib.Phase,
    directory: Path,
    environment: Environment,
    teacher: Teacher | None,
    *,
    dry: bool = False,
) -> TrainingJob:
    """Returns everything a training in `directory` needs.

    With `dry`, zeros replace the stored outputs of the teacher (`teacher.views`).
    """
    config = phase.config
    if not distill.facts(config.method).needs_teacher:
        teacher = None
    teacher_pixels = teacher.pixels if teacher else setup.pixels(config)
    student = _student(config, environment, teacher, teacher_pixels)
    checks.last_batch(config, len(environment.dataset.train))
    checks.two_classes(config, len(environment.dataset.classes), environment.notify)
    plan = _plan(config, len(environment.dataset.train), environment.mesh)
    spec, first_state = setup.spec(
        config,
        student,
        teacher.network if teacher else None,
        teacher_pixels=teacher_pixels,
        image_shape=environment.dataset.train.shape,
        steps_per_epoch=plan.steps_per_epoch,
        examples=len(environment.dataset.train),
        mesh=environment.mesh,
        class_weights=setup.class_weights(
            config, environment.dataset.train.labels, len(environment.dataset.classes)
        ),
        phase=phase,
    )
    if found := spec_lib.mismatched_joints(spec, environment.dataset.train.shape[0]):
        environment.notify(f"features of two shapes: {', '.join(found)}")
    score = evaluator(
        config, student, setup.pixels(config), environment, spec.student_at
    )
    train_data = feeds.of_run(
        environment.train,
        config.seed,
        environment.mesh,
        environment.notify,
        batch_size=plan.batch_size,
        drop_last=plan.drop_last,
        steps=plan.total_steps,
        fills=plan.fills,
    )
    source = teacher_source.source(
        config,
        spec,
        teacher.network.variables if teacher else None,
        train_data,
        environment.dataset,
        guard=environment.guard,
        notify=environment.notify,
        folder=environment.folder,
        dry=dry,
    )
    return TrainingJob(
        phase,
        _record(config, environment, plan, directory, student, first_state, score),
        spec,
        student,
        source,
        train_data,
    )


def _student(
    config: resolved.Config,
    environment: Environment,
    teacher: Teacher | None,
    teacher_pixels: spec_lib.Pixels,
) -> weights.Loaded:
    """Returns the student with what a method adds to it: gates, a borrowed head."""
    student = load_network("student", config, environment)
    student = weights.gated(student, setup.vam_options(config))
    sizes = borrowed.sizes(
        setup.pixels(config), teacher_pixels, environment.dataset.train.shape
    )
    network = teacher.network if teacher else None
    return borrowed.student(config, student, network, sizes)


def _record(
    config: resolved.Config,
    environment: Environment,
    plan: record_lib.Plan,
    directory: Path,
    student: weights.Loaded,
    first_state: Callable[[], state_lib.TrainState],
    score: evaluate.Evaluator,
) -> record_lib.RunRecord:
    """Returns what is written of a training, and when."""
    about = tracking.about(config, directory, environment.root)
    scales = None
    if config.log_updates:
        scales = functools.partial(updates.first_norms, student.model)
    return record_lib.RunRecord(
        plan,
        directory,
        config.seed,
        first_state,
        environment.minival,
        score,
        average_used=config.optim.ema > 0 and config.optim.ema_used,
        tracked=record_lib.Tracked(config.trackers, about),
        scales=scales,
    )


def engine(job: TrainingJob, environment: Environment) -> engine_lib.Engine:
    """Returns the engine that executes the steps of a job."""
    arguments = (job.config, job.spec, job.source, job.data, environment.guard)
    return setup.engine(*arguments, most=job.record.plan.steps_per_dispatch)


def fit(job: TrainingJob, environment: Environment) -> loop.Fit:
    """Returns the training loop of a job."""
    return loop.Fit(job.record, engine(job, environment), environment.guard)


def load_network(
    part: str, config: resolved.Config, environment: Environment, init: str = ""
) -> weights.Loaded:
    """Loads the network that the config describes.

    Args:
      part: "student" or "teacher".
      init: where its weights are; "" for where the config says.

    Raises:
      errors.TeacherError: see `weights.load`. A teacher may have other classes than
        the data; what follows from that is up to the caller.
    """
    block, is_student = getattr(config, part), part == "student"
    of_config, origin = not init, None
    if of_config and published.is_name(block.init):
        init, origin = _fetched(part, config, environment)
    loaded = weights.load(
        part,
        block.name,
        init or paths.within(environment.folder, block.init, f"{part}.init"),
        dtype=config.dtype,
        num_classes=len(environment.dataset.classes),
        options=setup.network_options(config, part),
        image_size=block.image_size,
        data_size=max(environment.dataset.train.shape[:2]),
        key=block.init_key if of_config else "",
        classes=environment.dataset.classes,
        new_head=is_student and of_config and config.student.new_head,
        any_classes=not is_student,
        origin=origin,
    )
    if loaded.remark:
        environment.notify(f"{part}.init: {loaded.source}: {loaded.remark}")
    return loaded


def _fetched(
    part: str, config: resolved.Config, environment: Environment
) -> tuple[str, published.Published]:
    """Returns the file of weights given by name, and what their publisher says.

    It is fetched by the first process, and by those that do not see its files.
    """
    cache = environment.folder / paths.local(config.teacher.cache, "teacher.cache")
    fetch = functools.partial(
        downloads.fetch,
        part,
        getattr(config, part).init,
        cache / "downloads",
        environment.notify,
    )
    with environment.guard.released():  # it may take long, and is then continued
        path, origin = hosts.in_turn(fetch)
    return str(path), origin


def evaluator(
    config: resolved.Config,
    network: weights.Loaded,
    pixels: spec_lib.Pixels,
    environment: Environment,
    model_at: Callable[[Any], chain.Chain] | None = None,
) -> evaluate.Evaluator:
    """Returns an evaluator of a network; see `evaluate.Evaluator`."""
    return evaluate.Evaluator(
        network.model,
        pixels,
        config.eval_batch_size,
        environment.mesh,
        environment.guard,
        model_at,
    )


def _plan(
    config: resolved.Config, examples: int, mesh: jax.sharding.Mesh
) -> record_lib.Plan:
    steps_per_epoch = order.steps_per_epoch(
        examples, config.batch_size, config.data.drop_last
    )
    stepwise = config.local.engine != "fused" or config.data.streaming
    default = 1 if backend.on_cpu(mesh) or stepwise else STEPS_PER_DISPATCH
    return record_lib.Plan(
        batch_size=config.batch_size,
        drop_last=config.data.drop_last,
        examples=examples,
        epochs=config.epochs,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.checkpoint.every_steps or steps_per_epoch,
        steps_per_dispatch=config.steps_per_dispatch or default,
        keep=config.checkpoint.keep,
        fills=setup.fills(config, examples),
    )
