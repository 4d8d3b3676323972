"""From a config to the pieces of a run: the one place where fields are read."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.distill.base import method as method_lib
from lakd_jax.hme import losses, phases
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.models import vam
from lakd_jax.runtime import backend, hosts, interrupt
from lakd_jax.training import dot, feeds, optim, spec
from lakd_jax.training import engine as engine_lib
from lakd_jax.training import state as state_lib
from lakd_jax.training import step as step_lib
from lakd_jax.training import vam as vam_lib

PyTree = Any


def pixels(config: config_lib.ConfigDict) -> spec.Pixels:
    """What the student sees of an image."""
    return spec.Pixels(
        tuple(config.data.mean),
        tuple(config.data.std),
        jnp.dtype(config.dtype),
        config.student.image_size,
    )


def learner(
    config: config_lib.ConfigDict,
    student: weights.Loaded,
    teacher: weights.Loaded | None,
    *,
    teacher_pixels: spec.Pixels,
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
    examples: int,
    mesh: jax.sharding.Mesh,
    stage: phases.Stage | None = None,
) -> tuple[spec.Learner, Callable[[], state_lib.TrainState]]:
    """The step's fixed parts, and a function that makes the first state.

    Args:
      config: resolved.
      image_shape: (H, W, 3) of the training images.
      examples: how many those are.
      stage: of an HME's training; None for other students.
    """
    facts, method = distill.facts(config.method), _method(config)
    local, staged = config.local, facts.staged
    partition = cuts.modules(
        student.model,
        teacher.model if teacher else student.model,
        local.granularity if staged else "none",
        local.cuts if staged else (),
        local.modules if staged else 0,
    )
    own = functools.partial(learning_rate, config)
    rate = (stage.learning_rate if stage else own)(steps_per_epoch)
    draft = spec.Learner(
        student=student.model,
        teacher=teacher.model if teacher else None,
        method=method,
        partition=partition,
        facts=facts,
        cut_scale=facts.cut_scale if local.cut_scale < 0 else local.cut_scale,
        module_input=local.module_input if facts.local else "student",
        uncut=method.needs_uncut,
        vam_gamma=config.student.vam.gamma,
        starts=tuple(local.module_start_epochs) if facts.local else (),
        preact=facts.local and config.lakd.preact,
        student_pixels=pixels(config),
        teacher_pixels=teacher_pixels,
        pad=config.data.pad,
        flip=config.data.flip,
        views=config.teacher.views if teacher else 0,
        steps_per_epoch=steps_per_epoch,
        examples=examples,
        optimizer=optax.identity(),  # the real one needs the parameters' names
        optimizer_of=functools.partial(_optimizer, config, rate),
        learning_rate=rate,
        weight_decay=config.optim.weight_decay,
        labels=None,
        mesh=mesh,
        apart=config.optim.dot_delta > 0,
        anneal=stage.anneal if stage else None,
    )
    init = _initialiser(draft, teacher, _seed_key(config, stage), image_shape)
    params, _ = jax.eval_shape(init)
    labels = cuts.label_tree(params, partition, student.model)
    if stage:
        optimizer = stage.optimizer(params, labels, steps_per_epoch)
    else:
        optimizer = draft.optimizer_of(labels)
    done = dataclasses.replace(draft, optimizer=optimizer, labels=labels)
    return done, lambda: _first_state(done, init, student.variables, stage)


def engine(
    config: config_lib.ConfigDict,
    learner: spec.Learner,
    teacher_variables: PyTree,
    data: state_lib.Resident | feeds.Run,
    guard: interrupt.Guard,
) -> engine_lib.Engine:
    """What runs the steps: `local.engine` for methods that cut the student."""
    kind = config.local.engine if distill.facts(config.method).local else "fused"
    arguments = (learner, teacher_variables, data, guard)
    if kind == "fused":
        return engine_lib.Fused(*arguments)
    devices = tuple(learner.mesh.devices.flat) if kind == "pipeline" else ()
    return engine_lib.Modules(*arguments, devices)


def _optimizer(
    config: config_lib.ConfigDict, rate: optax.Schedule, labels: PyTree
) -> optax.GradientTransformation:
    """What `config.optim` describes."""
    if config.optim.dot_delta:
        return dot.sgd(
            rate,
            momentum=config.optim.momentum,
            delta=config.optim.dot_delta,
            weight_decay=config.optim.weight_decay,
        )
    return optim.sgd(
        rate,
        momentum=config.optim.momentum,
        nesterov=config.optim.nesterov,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        labels=labels,
    )


def _method(config: config_lib.ConfigDict) -> method_lib.Method:
    """The method, in its form for the student's outputs."""
    if config.student.name != "hme" or config.hme.loss != "binary":
        names = distill.parts(config.method)
        alone = {name: config_lib.changed(config, {"method": name}) for name in names}
        options = {name: method_options(own) for name, own in alone.items()}
        if len(names) > 1:
            return distill.create_sum(options)
        return distill.create(config.method, options[config.method])
    weight = config.hme.positive_weight
    if config.method == "none":
        return losses.BinaryPlain(weight)
    own = {n: v for n, v in config.kd.items() if n != "standardise"}
    return losses.BinaryKD(**own, positive_weight=weight)


def network_options(config: config_lib.ConfigDict) -> dict[str, Any]:
    """What `models.create` takes for the student beside what all networks have."""
    if config.student.name != "hme":
        return {}
    h = config.hme
    output = "odds" if h.loss == "binary" else h.output
    return {"layout": h.layout, "base": h.base, "output": output}


def vam_options(config: config_lib.ConfigDict) -> vam.Options | None:
    """The student's virtual attention; None for none."""
    block = config.student.vam
    if not block.enabled:
        return None
    own = (field.name for field in dataclasses.fields(vam.Options))
    return vam.Options(**{name: block[name] for name in own})


def learning_rate(
    config: config_lib.ConfigDict, steps_per_epoch: int
) -> optax.Schedule:
    """The schedule that `config.optim` describes."""
    o = config.optim
    scale = config.batch_size / o.lr_batch if o.lr_batch else 1.0
    return optim.schedule(
        o.schedule,
        o.lr * scale,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        milestones=o.milestones,
        decay=o.decay,
        warmup_epochs=o.warmup_epochs,
    )


def method_options(config: config_lib.ConfigDict) -> dict[str, Any]:
    """The fields that `distill.create` takes for this method, which is no sum."""
    name, smoothing = config.method, {"label_smoothing": config.label_smoothing}
    if name == "none":
        return smoothing
    kd = config.kd.to_dict()
    if name == "kd":
        return kd | smoothing
    if name in ("afd", "rtk"):
        return {**config[name], "temperature": config.kd.temperature}
    if name != "lakd":
        return config[name].to_dict()
    own = {n: v for n, v in config.lakd.items() if n != "preact"}  # the step's
    starts = tuple(config.local.module_start_epochs)
    return {**own, **kd, "module_start_epochs": starts}


def _seed_key(config: config_lib.ConfigDict, stage: phases.Stage | None) -> jax.Array:
    """The key of the initial weights."""
    purpose = stage.purpose if stage else state_lib.INITIALISE
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def _initialiser(
    learner: spec.Learner,
    teacher: weights.Loaded | None,
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> Callable[[], tuple[PyTree, PyTree]]:
    """A function that makes ({part: params}, {part: batch statistics})."""
    images = jnp.zeros((2, *image_shape), jnp.uint8)
    labels = jnp.zeros((2,), jnp.int32)

    def init() -> tuple[PyTree, PyTree]:
        keys = dict(zip(("student", "method"), jax.random.split(key), strict=True))
        variables = learner.student.init(
            keys["student"], learner.student_pixels(images), train=False
        )
        params = {"student": variables["params"]}
        stats = {"student": variables["batch_stats"]}
        signals, _ = step_lib.observe(
            learner,
            params,
            stats,
            _zeros(teacher),
            images,
            labels,
            jnp.int32(0),
            key,
            labels,
        )
        own = learner.method.init(keys["method"], signals, train=True)
        params["method"] = own.get("params", {})
        stats["method"] = own.get("batch_stats", {})
        return params, stats

    return init


def _zeros(teacher: weights.Loaded | None) -> PyTree:
    """Stand-in teacher weights: only their shapes matter to an initialisation."""
    if teacher is None:
        return None
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), teacher.variables)


def _first_state(
    learner: spec.Learner,
    init: Callable[[], tuple[PyTree, PyTree]],
    student_variables: PyTree | None,
    stage: phases.Stage | None,
) -> state_lib.TrainState:
    # Runs once, and its random numbers take XLA's CPU compiler five times longer to
    # optimise than to run as they are.
    options: Any = {"xla_backend_optimization_level": 0} if backend.on_cpu() else None
    params, stats = jax.jit(init).lower().compile(compiler_options=options)()
    if student_variables is not None:
        given = student_variables["params"]
        params["student"] = vam_lib.completed(given, params["student"])
        stats["student"] = student_variables["batch_stats"]
    if stage:
        drawn = {"params": params["student"], "batch_stats": stats["student"]}
        begin = stage.first_variables(drawn)
        params["student"], stats["student"] = begin["params"], begin["batch_stats"]
    state = state_lib.TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=stats,
        opt_state=learner.optimizer.init(params),
    )
    hosts.agree_on_arrays("the first state", state)
    return state_lib.replicate(state, learner.mesh)
