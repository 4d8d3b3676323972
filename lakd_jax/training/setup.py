"""Builds the parts of a run from a config, the only place that reads its fields."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lakd_jax import distill, errors, models
from lakd_jax.config import resolved
from lakd_jax.data import device, distortion, mixing
from lakd_jax.data import preparation as preparation_lib
from lakd_jax.distill.base import method as method_lib
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.models import chain, vam
from lakd_jax.runtime import backend, hosts, interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import ema, feeds
from lakd_jax.training import engine as engine_lib
from lakd_jax.training import phase as phase_lib
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib
from lakd_jax.training import step as step_lib
from lakd_jax.training import vam as vam_lib

PyTree = Any


def pixels(config: resolved.Config) -> spec_lib.Pixels:
    """Returns the conversion of images to the student's input."""
    return spec_lib.Pixels(
        config.data.mean,
        config.data.std,
        jnp.dtype(config.dtype),
        config.student.image_size,
    )


def preparation(
    config: resolved.Config, image_shape: tuple[int, ...]
) -> preparation_lib.Preparation:
    """Returns how test images become arrays of `image_shape` (H, W, 3)."""
    height, width, _ = image_shape
    shorter = config.data.test_resize if config.data.streaming else 0
    return preparation_lib.Preparation(height, width, shorter, config.data.orientation)


def class_weights(
    config: resolved.Config, labels: np.ndarray | None, classes: int
) -> tuple[float, ...]:
    """Returns the weights of `optim.class_weights`, with a mean of 1 over the images.

    "balanced" weighs a class by the inverse of its number of images.

    Args:
      config: of the run.
      labels: (N,) of the training split; None if they are not known.
      classes: how many there are.

    Raises:
      errors.ConfigError: the number of weights is another, or labels are needed.
    """
    given = config.optim.class_weights
    if given != "balanced":
        weights = tuple(float(w) for w in given.split(",") if w)
        if weights and len(weights) != classes:
            fault = f"has {len(weights)} weights for {classes} classes"
            raise errors.ConfigError([f"optim.class_weights {fault}"])
        return weights
    if labels is None:
        raise errors.ConfigError(
            [
                "optim.class_weights=balanced needs the labels of all training images, "
                "which are not known before they are read from this data: give numbers"
            ]
        )
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)
    return tuple((len(labels) / (classes * counts)).tolist())


def fills(config: resolved.Config, examples: int) -> bool:
    """Returns whether an epoch's short last batch is filled up, see `spec.StepSpec`.

    It is where padding can be kept out of everything else: the method must say so, the
    network be one of ours, and no image be mixed with another.
    """
    if config.data.drop_last or examples < config.batch_size:
        return False
    name, d = config.student.name, config.data
    return (
        examples % config.batch_size > 0
        and distill.facts(config.method).per_example
        and models.meets_in_norms(name)
        and not config.student.vam.enabled
        and not (d.mixup or d.cutmix)
        and config.optim.accumulate == 1
    )


def spec(
    config: resolved.Config,
    student: weights.Loaded,
    teacher: weights.Loaded | None,
    *,
    teacher_pixels: spec_lib.Pixels,
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
    examples: int,
    mesh: jax.sharding.Mesh,
    class_weights: tuple[float, ...] = (),
    phase: phase_lib.Phase | None = None,
) -> tuple[spec_lib.StepSpec, "FirstState"]:
    """Returns the step's constants and what makes the first state.

    Args:
      config: the resolved config.
      image_shape: the shape (H, W, 3) of the training images.
      examples: the number of training images.
      class_weights: see `class_weights`.
      phase: the training phase; None for the first or only one.
    """
    phase = phase or phase_lib.first(config)
    facts, method = distill.facts(config.method), phase.method() or _method(config)
    local = config.local
    partition = _partition(config, student, teacher)
    starts = local.module_start_epochs if facts.local else ()
    cut_scale = facts.cut_scale if local.cut_scale < 0 else local.cut_scale
    draft = spec_lib.StepSpec(
        student=student.model,
        teacher=teacher.model if teacher else None,
        method=method,
        partition=partition,
        facts=facts,
        cut_scale=cut_scale,
        opening=_opening(
            cut_scale, local.cut_end, phase.config.epochs * steps_per_epoch
        ),
        module_input=local.module_input if facts.local else "student",
        uncut=method.needs_uncut,
        starts=starts,
        preact=facts.local and config.methods["lakd"]["preact"],
        student_pixels=pixels(config),
        teacher_pixels=teacher_pixels,
        pad=config.data.pad,
        flip=config.data.flip,
        views=config.teacher.views if teacher else 0,
        steps_per_epoch=steps_per_epoch,
        examples=examples,
        optimizer=optax.identity(),  # replaced below: the real one needs the parameters
        optimizer_of=functools.partial(phase.optimizer, steps_per_epoch),
        learning_rate=phase.learning_rate(steps_per_epoch),
        weight_decay=config.optim.weight_decay,
        labels=None,
        mesh=mesh,
        momenta=phase.momenta(),
        decay_mask=config.optim.decay_mask,
        class_weights=class_weights,
        label_smoothing=config.label_smoothing,
        distortion=_distortion(config),
        mixing=_mixing(config, student.model.num_classes),
        average=average(config),
        fills=fills(config, examples),
        accumulate=config.optim.accumulate,
        wide_sums=config.optim.wide_sums,
        log_updates=config.log_updates,
        student_at=phase.student_at(student.model, steps_per_epoch),
        regularise=_gate_losses(config, student.model, partition, starts),
    )
    init = _initialiser(draft, teacher, phase_lib.key(phase), image_shape)
    params, _ = jax.eval_shape(init)
    labels = cuts.label_tree(params, partition, student.model)
    finished = dataclasses.replace(
        draft, optimizer=draft.optimizer_of(labels), labels=labels
    )
    return finished, FirstState(finished, init, student.variables, phase)


def _opening(
    start: float, end: float, steps: int
) -> Callable[[jax.Array], jax.Array] | None:
    """Returns the share of the gradient kept at cuts by step; None if it stays."""
    if end < 0 or end == start:
        return None
    left = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: jnp.asarray(end + (start - end) * left(step))


def _partition(
    config: resolved.Config, student: weights.Loaded, teacher: weights.Loaded | None
) -> cuts.Partition:
    """Returns the student's modules, of methods that have a loss in each."""
    local, staged = config.local, distill.facts(config.method).staged
    return cuts.modules(
        student.model,
        teacher.model if teacher else student.model,
        local.granularity if staged else "none",
        local.cuts if staged else (),
        local.modules if staged else 0,
    )


def _gate_losses(
    config: resolved.Config,
    student: chain.Chain,
    partition: cuts.Partition,
    starts: tuple[float, ...],
) -> Callable[..., tuple[method_lib.ModuleLoss, ...]] | None:
    """Returns what adds the entropy of the student's gates; None without gates."""
    if not student.vam:
        return None
    return functools.partial(
        vam_lib.with_entropy,
        gamma=config.student.vam.gamma,
        owner=lambda path: cuts.module_of(path, partition, student),
        starts=starts,
    )


def _distortion(config: resolved.Config) -> distortion.Distortion:
    d = config.data
    return distortion.Distortion(d.jitter, d.policy, d.erase, d.mean, d.std)


def _mixing(config: resolved.Config, classes: int) -> mixing.Mixing | None:
    """Returns how images are mixed; None if they are not."""
    d = config.data
    if not d.mixup and not d.cutmix:
        return None
    return mixing.Mixing(d.mixup, d.cutmix, classes, config.label_smoothing)


def average(config: resolved.Config) -> ema.Average | None:
    """Returns how the student is averaged; None if it is not."""
    o = config.optim
    return ema.Average(o.ema, o.ema_warmup) if o.ema else None


def engine(
    config: resolved.Config,
    spec: spec_lib.StepSpec,
    teacher_variables: PyTree,
    data: device.DeviceData | feeds.Run,
    guard: interrupt.Guard,
    most: int = 1,
) -> engine_lib.Engine:
    """Returns the engine that runs the steps, up to `most` of them in one program.

    It is `local.engine` for methods that cut the student, and "fused" for all others.
    """
    kind = config.local.engine if distill.facts(config.method).local else "fused"
    arguments = (spec, teacher_variables, data, guard)
    if kind == "fused":
        return engine_lib.Fused(*arguments, most=most)
    devices = tuple(spec.mesh.devices.flat) if kind == "pipeline" else ()
    return engine_lib.Modules(*arguments, devices)


def _method(config: resolved.Config) -> method_lib.Method:
    """Returns the method that the config names, which may be a sum of methods."""
    names = distill.parts(config.method)
    options = {name: config.method_options(name) for name in names}
    if len(names) > 1:
        return distill.create_sum(options)
    return distill.create(config.method, options[config.method])


def network_options(config: resolved.Config, part: str = "student") -> dict[str, Any]:
    """Returns the options of `models.create` that a network offers and the config sets.

    All but the size of images, which may depend on the data.
    """
    block = getattr(config, part)
    names = ("shortcut", "dropout", "drop_path")
    options: dict[str, Any] = {name: getattr(block, name) for name in names}
    if block.patch:
        options["patch"] = block.patch
    if block.layer_scale >= 0:
        options["layer_scale"] = block.layer_scale
    if module := phase_lib.module_of(block.name) if part == "student" else None:
        options |= module.network_options(config)
    offered = models.family(block.name).OPTIONS
    chosen = {name: value for name, value in options.items() if name in offered}
    if part == "student" and config.student.one_pass:
        chosen["one_pass"] = True
    return chosen


def vam_options(config: resolved.Config) -> vam.Options | None:
    """Returns the options of the student's virtual attention; None if disabled."""
    block = config.student.vam
    if not block.enabled:
        return None
    names = (field.name for field in dataclasses.fields(vam.Options))
    return vam.Options(**{name: getattr(block, name) for name in names})


def _initialiser(
    spec: spec_lib.StepSpec,
    teacher: weights.Loaded | None,
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> Callable[[], tuple[PyTree, PyTree]]:
    """Returns a function that initialises parameters and other collections.

    Both are in the form of `TrainState.params` and `TrainState.collections`.
    """
    images = jnp.zeros((2, *image_shape), jnp.uint8)
    labels = jnp.zeros((2,), jnp.int32)

    def init() -> tuple[PyTree, PyTree]:
        keys = dict(zip(("student", "method"), jax.random.split(key), strict=True))
        student = spec.student.init(
            keys["student"], spec.student_pixels(images), train=False
        )
        student_state = _state_of(jnp.int32(0), {"student": student, "method": {}})
        signals = step_lib.first_signals(
            spec, student_state, _zeros(teacher), images, labels, key
        )
        method = spec.method.init(keys["method"], signals, train=True)
        state = _state_of(student_state.step, {"student": student, "method": method})
        return state.params, state.collections

    return init


def _state_of(
    step: jax.Array, variables: Mapping[str, Mapping[str, PyTree]]
) -> state_lib.TrainState:
    """Returns a state without optimiser state from {part: {collection: ...}}."""
    names = dict.fromkeys(["params", *(n for v in variables.values() for n in v)])
    kinds = {n: {p: v.get(n, {}) for p, v in variables.items()} for n in names}
    return state_lib.TrainState(step, kinds.pop("params"), kinds, ())


def _zeros(teacher: weights.Loaded | None) -> PyTree:
    """Returns zeros as the teacher's weights: initialisation depends on shapes only."""
    if teacher is None:
        return None
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), teacher.variables)


def _completed(given: PyTree, drawn: PyTree) -> PyTree:
    """Returns `given` with what it lacks, gates or a new classifier, from `drawn`."""
    arrays = flax.traverse_util.flatten_dict(drawn)
    return flax.traverse_util.unflatten_dict(
        arrays | flax.traverse_util.flatten_dict(given)
    )


@dataclasses.dataclass(frozen=True)
class FirstState:
    """Makes the state before the first step.

    Attributes:
      spec: of the steps.
      init: draws parameters and other collections, in the form of `TrainState`.
      student_variables: take the place of the student's that are drawn; None for none.
      phase: the training phase.
    """

    spec: spec_lib.StepSpec
    init: Callable[[], tuple[PyTree, PyTree]]
    student_variables: Mapping[str, PyTree] | None
    phase: phase_lib.Phase

    def __call__(self) -> state_lib.TrainState:
        """Returns the state, on all devices."""
        # It runs once, and on CPU XLA takes five times longer to optimise the random
        # number generation than to run it unoptimised.
        cpu = backend.on_cpu(self.spec.mesh)
        options: Any = {"xla_backend_optimization_level": 0} if cpu else None
        init = jax.jit(self.init).lower().compile(compiler_options=options)
        params, collections = init()
        drawn = state_lib.TrainState(jnp.int32(0), params, collections, ())
        student = drawn.variables("student")
        if self.student_variables is not None:
            for kind, given in self.student_variables.items():
                student[kind] = _completed(given, student.get(kind, {}))
        for kind, tree in self.phase.first_variables(student).items():
            (params if kind == "params" else collections[kind])["student"] = tree
        state = self._begun(params, collections)
        hosts.agree_on_arrays("the first state", state)
        return mesh_lib.replicate(state, self.spec.mesh)

    def shapes(self) -> state_lib.TrainState:
        """Returns the shapes and types of the state; computes nothing."""
        return jax.eval_shape(lambda: self._begun(*self.init()))

    def _begun(self, params: PyTree, collections: PyTree) -> state_lib.TrainState:
        first = ema.of({"params": params} | collections) if self.spec.average else {}
        optimizer = self.spec.optimizer.init(params)
        return state_lib.TrainState(
            jnp.int32(0), params, collections, optimizer, average=first
        )
