"""How the steps of a run are executed: in one program, or in one a module.

All engines make the same steps. `Fused` is one program for the whole step and, on
accelerators, for many steps. `Modules` is one program a module: what is in memory at
once is then one module's part, and modules that are alike share a program. With
`devices` it is a pipeline: module k of student and teacher stay on a device, only the
boundary between modules travels, and as nothing flows back, module k works on a batch
while module k - 1 has begun the next.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lakd_jax.models import chain
from lakd_jax.runtime import backend, interrupt
from lakd_jax.training import feeds, modules, spec, step
from lakd_jax.training import state as state_lib

PyTree = Any
_STEM = "['stem']"  # which no other unit is like


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one step, as the compiler counts them: operations and bytes a device."""

    flops: float
    arguments: int
    temporary: int


class Engine(Protocol):
    """What the training loop asks of an engine."""

    def load(self, state: state_lib.TrainState) -> None:
        """Starts from `state`, which must not be used afterwards."""
        ...

    def run(self, rows: np.ndarray) -> Sequence[spec.Metrics]:
        """One step for each row of `rows` (n, B), positions in the training split.

        Returns at once: metrics (n,) each, on the device, of every program that ran;
        `modules.together` makes those of the steps from them.
        """
        ...

    def state(self) -> state_lib.TrainState:
        """The whole state after all steps so far; valid until the next `run`."""
        ...

    def costs(self) -> Costs:
        """Of the last step that ran."""
        ...

    def close(self) -> None:
        """Lets go of what reads data ahead."""
        ...


def first_step(state: state_lib.TrainState) -> int:
    """Returns the number of the step that comes next."""
    return int(jax.device_get(state_lib.on_one_device(state.step)))


class Fused:
    """One program for the whole step."""

    def __init__(
        self,
        learner: spec.Learner,
        teacher_variables: PyTree,
        data: state_lib.Resident | feeds.Run,
        guard: interrupt.Guard,
    ):
        self._learner, self._teacher = learner, teacher_variables
        self._guard = guard
        self._feed = feeds.feed(data)
        self._programs: dict[tuple[int, ...], Any] = {}

    def load(self, state: state_lib.TrainState) -> None:
        """See `Engine`."""
        self._feed.begin(first_step(state))
        self._state = state

    def close(self) -> None:
        """See `Engine`."""
        self._feed.close()

    def state(self) -> state_lib.TrainState:
        """See `Engine`."""
        return self._state

    def run(self, rows: np.ndarray) -> Sequence[spec.Metrics]:
        """See `Engine`."""
        arguments = (self._state, self._teacher, self._feed.next(rows), rows)
        if rows.shape not in self._programs:
            program = jax.jit(
                functools.partial(step.run_steps, self._learner),
                donate_argnums=0,
                out_shardings=_whole(self._learner.mesh),
            )
            self._programs[rows.shape] = _compiled(program, arguments, self._guard)
        self._last = self._programs[rows.shape]
        self._state, metrics = self._last(*arguments)
        return (metrics,)

    def costs(self) -> Costs:
        """See `Engine`."""
        return _costs([self._last])


class Modules:
    """One program a module; see the top of this file."""

    def __init__(
        self,
        learner: spec.Learner,
        teacher_variables: PyTree,
        data: state_lib.Resident | feeds.Run,
        guard: interrupt.Guard,
        devices: Sequence[Any] = (),
    ):
        """Raises ValueError where modules need more than the boundary below.

        Args:
          devices: among which the modules are shared out in order, for a pipeline; ()
            runs each on all devices of the learner.
        """
        if not learner.isolated:
            raise ValueError("modules that need each other need local.engine=fused")
        self._learner, self._guard = learner, guard
        count = len(learner.partition.names)
        self._meshes = [learner.mesh] * count
        if devices:
            places = [devices[k * len(devices) // count] for k in range(count)]
            self._meshes = [Mesh(np.array([d]), ("data",)) for d in places]
        if isinstance(data, state_lib.Resident):
            data = jax.device_put(data, _whole(self._meshes[0]))
        self._feed = feeds.feed(data)
        self._teacher = teacher_variables
        self._programs: dict[Any, tuple[Any, list[Any]]] = {}

    def load(self, state: state_lib.TrainState) -> None:
        """See `Engine`."""
        learner = self._learner
        self._feed.begin(first_step(state))
        self._like = jax.eval_shape(lambda: state)
        numbers = range(len(self._meshes))
        states = [modules.module_state(learner, state, k) for k in numbers]
        teachers = [modules.teacher_part(learner, self._teacher, k) for k in numbers]
        alike = [_signature(learner, k, states[k], teachers[k]) for k in numbers]
        # Of modules that differ only by their names the first one's program serves all.
        self._as = [alike.index(signature) for signature in alike]
        self._own = [jax.eval_shape(lambda s=s: s) for s in states]
        self._states, self._teachers = [], []
        for k, mesh in enumerate(self._meshes):
            first = self._as[k]
            own = _like(states[first], states[k], first, k, _student_units, learner)
            self._states.append(state_lib.replicate(own, mesh))
            part = _like(
                teachers[first], teachers[k], first, k, _teacher_units, learner
            )
            self._teachers.append(state_lib.replicate(part, mesh))

    def close(self) -> None:
        """See `Engine`."""
        self._feed.close()

    def state(self) -> state_lib.TrainState:
        """See `Engine`."""
        parts = []
        for k, (own, first) in enumerate(zip(self._own, self._as, strict=True)):
            state = self._states[k]
            parts.append(_like(own, state, k, first, _student_units, self._learner))
        joined = modules.rearranged(self._like, *parts)
        return jax.device_put(joined, _whole(self._learner.mesh))

    def run(self, rows: np.ndarray) -> Sequence[spec.Metrics]:
        """See `Engine`; one row at a time."""
        (row,) = rows
        data = self._feed.next(rows)
        if self._meshes[0] != self._learner.mesh:  # a no-op for what is there already
            data = jax.device_put(data, _whole(self._meshes[0]))
        if row.shape not in self._programs:
            # All before the first one runs: a stop while compiling finds whole steps.
            self._programs[row.shape] = self._compile(row, data)
        begin, programs = self._programs[row.shape]
        self._ran = [begin, *programs]
        passed = begin(self._states[0].step, data, row)
        told = []
        for k, program in enumerate(programs):
            passed = jax.device_put(passed, self._sharding(k, len(row)))
            own = (self._states[k], self._teachers[k])
            self._states[k], above, metrics = program(*own, *passed)
            passed = (above, *passed[1:])
            told.append(_numbered(metrics, self._as[k] + 1, k + 1))
        return told

    def costs(self) -> Costs:
        """See `Engine`."""
        return _costs(self._ran)

    def _compile(
        self, row: np.ndarray, data: state_lib.Resident
    ) -> tuple[Any, list[Any]]:
        """The programs for a batch of this size: what feeds the modules, and theirs."""
        first_learner = dataclasses.replace(self._learner, mesh=self._meshes[0])
        begin = jax.jit(
            functools.partial(modules.start, first_learner),
            out_shardings=self._sharding(0, len(row)),
        )
        arguments = (self._states[0].step, data, row)
        passed = jax.eval_shape(begin, *arguments)
        start = _compiled(begin, arguments, self._guard)
        compiled: dict[Any, Any] = {}
        programs = []
        for k, (mesh, first) in enumerate(zip(self._meshes, self._as, strict=True)):
            passed = _placed(passed, self._sharding(k, len(row)))
            arguments = (self._states[k], self._teachers[k], *passed)
            program = self._module_program(first, mesh, len(row))
            _, above, _ = jax.eval_shape(program, *arguments)
            key = (first, tuple(mesh.devices.flat), _shapes(passed), _shapes(above))
            if key not in compiled:
                compiled[key] = _compiled(program, arguments, self._guard)
            programs.append(compiled[key])
            passed = (above, *passed[1:])
        return start, programs

    def _module_program(self, k: int, mesh: Mesh, examples: int) -> Any:
        def update(*arguments: Any) -> tuple:
            state, above, metrics = modules.module_step(self._learner, k, *arguments)
            return state, above, jax.tree.map(lambda m: m[None], metrics)

        shardings = (_whole(mesh), _split(mesh, examples), _whole(mesh))
        return jax.jit(update, donate_argnums=0, out_shardings=shardings)

    def _sharding(self, k: int, examples: int) -> tuple[NamedSharding, ...]:
        """Of what module `k` is passed: the boundary, the labels, the key."""
        split = _split(self._meshes[k], examples)
        return split, split, _whole(self._meshes[k])


def _placed(passed: tuple, shardings: tuple[NamedSharding, ...]) -> tuple:
    """Shapes with the places that the arrays will have."""
    return tuple(
        jax.tree.map(
            lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
        )
        for tree, sharding in zip(passed, shardings, strict=True)
    )


def _shapes(tree: PyTree) -> tuple:
    return tuple(x.shape for x in jax.tree.leaves(tree))


def _signature(
    learner: spec.Learner,
    k: int,
    state: state_lib.TrainState,
    teacher_variables: PyTree,
) -> Any:
    """Equal for modules that one program can run."""
    if learner.starts:
        return k  # each has a schedule of its own
    found = []
    for units, tree in (
        (_student_units(learner, k), state),
        (_teacher_units(learner, k), teacher_variables),
    ):
        places = {unit: f"#{i}" for i, unit in enumerate(units) if unit != _STEM}
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]
        found.append(sorted((_renamed(places, name), shape) for name, shape in names))
    return found


def _like(
    tree: PyTree,
    source: PyTree,
    own: int,
    other: int,
    units: Callable[[spec.Learner, int], list[str]],
    learner: spec.Learner,
) -> PyTree:
    """`tree` of module `own` with the leaves of module `other` in their places."""
    names = dict(zip(units(learner, own), units(learner, other), strict=True))
    return modules.rearranged(tree, source, rename=functools.partial(_renamed, names))


def _student_units(learner: spec.Learner, k: int) -> list[str]:
    """How paths name what belongs to module `k`: its losses, then the student's units.

    The head is left out: it has the same name in every network.
    """
    joints = learner.partition.student_joints
    units = _units(learner.student, joints, k)
    return [f"['{learner.partition.names[k]}']", *units]


def _teacher_units(learner: spec.Learner, k: int) -> list[str]:
    """The same of the teacher's units beside it."""
    assert learner.teacher is not None  # of isolated modules
    return _units(learner.teacher, learner.partition.teacher_joints, k)


def _units(model: chain.Chain, joints: Sequence[str], k: int) -> list[str]:
    order = model.unit_names
    first = order.index(joints[k - 1]) + 1 if k else 0
    units = order[first : order.index(joints[k]) + 1]
    return ["".join(f"['{part}']" for part in unit.split(".")) for unit in units]


def _renamed(names: Mapping[str, str], path: str) -> str:
    """`path` with the one of `names` that it contains replaced."""
    for old, new in names.items():
        if old in path:
            return path.replace(old, new)
    return path


def _numbered(metrics: spec.Metrics, old: int, new: int) -> spec.Metrics:
    """The metrics of module number `old` under the names of number `new`."""
    if old == new:
        return metrics
    prefix, own = f"module{old}/", f"module{new}/"
    return {name.replace(prefix, own): value for name, value in metrics.items()}


def _compiled(function: Any, arguments: tuple, guard: interrupt.Guard) -> Any:
    lowered = function.lower(*arguments)
    with guard.released():
        return lowered.compile(compiler_options=backend.compiler_options())


def _costs(programs: Sequence[Any]) -> Costs:
    """All operations; the memory of the largest program."""
    memory = [program.memory_analysis() for program in programs]
    return Costs(
        flops=sum(p.cost_analysis().get("flops", float("nan")) for p in programs),
        arguments=max(m.argument_size_in_bytes for m in memory),
        temporary=max(m.temp_size_in_bytes for m in memory),
    )


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _split(mesh: Mesh, examples: int) -> NamedSharding:
    """Of a batch: over the devices, if they can share it equally."""
    return state_lib.over_batch(mesh) if examples % mesh.size == 0 else _whole(mesh)
