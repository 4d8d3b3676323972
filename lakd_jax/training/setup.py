"""From a config to the pieces of a run: the one place where fields are read."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.data import device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.models import vam
from lakd_jax.runtime import backend, hosts, interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import engine as engine_lib
from lakd_jax.training import feeds
from lakd_jax.training import phase as phase_lib
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib
from lakd_jax.training import step as step_lib
from lakd_jax.training import vam as vam_lib

PyTree = Any


def pixels(config: config_lib.ConfigDict) -> spec_lib.Pixels:
    """What the student sees of an image."""
    return spec_lib.Pixels(
        tuple(config.data.mean),
        tuple(config.data.std),
        jnp.dtype(config.dtype),
        config.student.image_size,
    )


def spec(
    config: config_lib.ConfigDict,
    student: weights.Loaded,
    teacher: weights.Loaded | None,
    *,
    teacher_pixels: spec_lib.Pixels,
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
    examples: int,
    mesh: jax.sharding.Mesh,
    phase: phase_lib.Phase | None = None,
) -> tuple[spec_lib.StepSpec, Callable[[], state_lib.TrainState]]:
    """The step's fixed parts, and a function that makes the first state.

    Args:
      config: resolved.
      image_shape: (H, W, 3) of the training images.
      examples: how many those are.
      phase: of a network that is trained in several; None: the first, or the only one.
    """
    phase = phase or phase_lib.first(config)
    facts, method = distill.facts(config.method), phase.method() or _method(config)
    local, staged = config.local, facts.staged
    partition = cuts.modules(
        student.model,
        teacher.model if teacher else student.model,
        local.granularity if staged else "none",
        local.cuts if staged else (),
        local.modules if staged else 0,
    )
    rate = phase.learning_rate(steps_per_epoch)
    gates = functools.partial(
        vam_lib.with_entropy,
        gamma=config.student.vam.gamma,
        owner=lambda path: cuts.module_of(path, partition, student.model),
        starts=tuple(local.module_start_epochs) if facts.local else (),
    )
    draft = spec_lib.StepSpec(
        student=student.model,
        teacher=teacher.model if teacher else None,
        method=method,
        partition=partition,
        facts=facts,
        cut_scale=facts.cut_scale if local.cut_scale < 0 else local.cut_scale,
        module_input=local.module_input if facts.local else "student",
        uncut=method.needs_uncut,
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
        optimizer_of=functools.partial(phase.optimizer, steps_per_epoch),
        learning_rate=rate,
        weight_decay=config.optim.weight_decay,
        labels=None,
        mesh=mesh,
        apart=config.optim.dot_delta > 0,
        student_at=phase.student_at(student.model, steps_per_epoch),
        regularise=gates if student.model.vam else None,
    )
    init = _initialiser(draft, teacher, phase_lib.key(phase), image_shape)
    params, _ = jax.eval_shape(init)
    labels = cuts.label_tree(params, partition, student.model)
    done = dataclasses.replace(
        draft, optimizer=draft.optimizer_of(labels), labels=labels
    )
    return done, lambda: _first_state(done, init, student.variables, phase)


def engine(
    config: config_lib.ConfigDict,
    spec: spec_lib.StepSpec,
    teacher_variables: PyTree,
    data: device.DeviceData | feeds.Run,
    guard: interrupt.Guard,
) -> engine_lib.Engine:
    """What runs the steps: `local.engine` for methods that cut the student."""
    kind = config.local.engine if distill.facts(config.method).local else "fused"
    arguments = (spec, teacher_variables, data, guard)
    if kind == "fused":
        return engine_lib.Fused(*arguments)
    devices = tuple(spec.mesh.devices.flat) if kind == "pipeline" else ()
    return engine_lib.Modules(*arguments, devices)


def _method(config: config_lib.ConfigDict) -> method_lib.Method:
    """Returns the method, or the sum of methods."""
    names = distill.parts(config.method)
    alone = {name: config_lib.changed(config, {"method": name}) for name in names}
    options = {name: method_options(own) for name, own in alone.items()}
    if len(names) > 1:
        return distill.create_sum(options)
    return distill.create(config.method, options[config.method])


def network_options(config: config_lib.ConfigDict) -> dict[str, Any]:
    """Returns what `models.create` takes for the student beside what all have."""
    module = phase_lib.module_of(config.student.name)
    return module.network_options(config) if module else {}


def vam_options(config: config_lib.ConfigDict) -> vam.Options | None:
    """The student's virtual attention; None for none."""
    block = config.student.vam
    if not block.enabled:
        return None
    own = (field.name for field in dataclasses.fields(vam.Options))
    return vam.Options(**{name: block[name] for name in own})


def method_options(config: config_lib.ConfigDict) -> dict[str, Any]:
    """Returns the options that `distill.create` takes for this method, no sum."""
    values = config_lib.flat(config)
    sources = distill.option_sources(config.method)
    return {option: values[field] for option, field in sources.items()}


def _initialiser(
    spec: spec_lib.StepSpec,
    teacher: weights.Loaded | None,
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> Callable[[], tuple[PyTree, PyTree]]:
    """A function that makes ({part: params}, {part: batch statistics})."""
    images = jnp.zeros((2, *image_shape), jnp.uint8)
    labels = jnp.zeros((2,), jnp.int32)

    def init() -> tuple[PyTree, PyTree]:
        keys = dict(zip(("student", "method"), jax.random.split(key), strict=True))
        student = spec.student.init(
            keys["student"], spec.student_pixels(images), train=False
        )
        begun = _collected(jnp.int32(0), {"student": student, "method": {}})
        signals = step_lib.first_signals(
            spec, begun, _zeros(teacher), images, labels, key
        )
        method = spec.method.init(keys["method"], signals, train=True)
        state = _collected(begun.step, {"student": student, "method": method})
        return state.params, state.collections

    return init


def _collected(
    step: jax.Array, variables: Mapping[str, Mapping[str, PyTree]]
) -> state_lib.TrainState:
    """Returns a state without an optimiser's, of {part: {collection: ...}}."""
    names = dict.fromkeys(["params", *(n for v in variables.values() for n in v)])
    kinds = {n: {p: v.get(n, {}) for p, v in variables.items()} for n in names}
    return state_lib.TrainState(step, kinds.pop("params"), kinds, ())


def _zeros(teacher: weights.Loaded | None) -> PyTree:
    """Stand-in teacher weights: only their shapes matter to an initialisation."""
    if teacher is None:
        return None
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), teacher.variables)


def _first_state(
    spec: spec_lib.StepSpec,
    init: Callable[[], tuple[PyTree, PyTree]],
    student_variables: Mapping[str, PyTree] | None,
    phase: phase_lib.Phase,
) -> state_lib.TrainState:
    # Runs once, and its random numbers take XLA's CPU compiler five times longer to
    # optimise than to run as they are.
    options: Any = {"xla_backend_optimization_level": 0} if backend.on_cpu() else None
    params, collections = jax.jit(init).lower().compile(compiler_options=options)()
    state = state_lib.TrainState(jnp.int32(0), params, collections, ())
    student = state.variables("student")
    if student_variables is not None:
        given = student_variables["params"]
        student |= student_variables
        student["params"] = vam_lib.completed(given, params["student"])
    for kind, tree in phase.first_variables(student).items():
        (params if kind == "params" else collections[kind])["student"] = tree
    state = dataclasses.replace(state, opt_state=spec.optimizer.init(params))
    hosts.agree_on_arrays("the first state", state)
    return mesh_lib.replicate(state, spec.mesh)
