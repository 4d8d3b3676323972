"""How the steps of a run are executed: in one program, or in one per module.

All engines make the same steps. `Fused` is one program for the whole step and, on
accelerators, for many steps. `Modules` is one program per module: what is in memory at
once is then one module's part, and modules that are alike share a program, as their
variables are handed over by position. With
`devices` it is a pipeline: module k of student and teacher stay on a device, only the
boundary between modules travels, and as nothing flows back, module k works on a batch
while module k - 1 has begun the next.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lakd_jax.data import device
from lakd_jax.runtime import backend, interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import feeds, segments, step
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib

PyTree = Any
Metrics = dict[str, np.ndarray]


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

    def run(self, rows: np.ndarray) -> Any:
        """Makes a step for each row of `rows` (n, B), positions in the training split.

        Returns at once what `read` takes.
        """
        ...

    def read(self, pending: Any) -> Metrics:
        """Waits for the metrics, (n,) each, of what `run` started."""
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
    return int(jax.device_get(mesh_lib.on_one_device(state.step)))


class Fused:
    """One program for the whole step."""

    def __init__(
        self,
        spec: spec_lib.StepSpec,
        teacher_variables: PyTree,
        data: device.DeviceData | feeds.Run,
        guard: interrupt.Guard,
    ):
        self._spec, self._teacher = spec, teacher_variables
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

    def run(self, rows: np.ndarray) -> Any:
        """See `Engine`."""
        arguments = (self._state, self._teacher, self._feed.next(rows), rows)
        if rows.shape not in self._programs:
            program = jax.jit(
                functools.partial(step.run_steps, self._spec),
                donate_argnums=0,
                out_shardings=_whole(self._spec.mesh),
            )
            self._programs[rows.shape] = _compiled(program, arguments, self._guard)
        self._last = self._programs[rows.shape]
        self._state, metrics = self._last(*arguments)
        return metrics

    def read(self, pending: Any) -> Metrics:
        """See `Engine`."""
        return jax.device_get(pending)

    def costs(self) -> Costs:
        """See `Engine`."""
        return _costs([self._last])


class Modules:
    """One program per module; see the top of this file."""

    def __init__(
        self,
        spec: spec_lib.StepSpec,
        teacher_variables: PyTree,
        data: device.DeviceData | feeds.Run,
        guard: interrupt.Guard,
        devices: Sequence[Any] = (),
    ):
        """Raises ValueError where modules need more than the boundary below.

        Args:
          devices: among which the modules are shared out in order, for a pipeline; ()
            runs each on all devices of the learner.
        """
        if not spec.isolated:
            raise ValueError("modules that need each other need local.engine=fused")
        self._spec, self._guard = spec, guard
        self._segments = segments.of_student(spec)
        count = len(self._segments)
        self._meshes = [spec.mesh] * count
        if devices:
            places = [devices[k * len(devices) // count] for k in range(count)]
            self._meshes = [Mesh(np.array([d]), ("data",)) for d in places]
        if isinstance(data, device.DeviceData):
            data = jax.device_put(data, _whole(self._meshes[0]))
        self._feed = feeds.feed(data)
        self._teacher = teacher_variables
        self._programs: dict[Any, tuple[Any, list[Any]]] = {}

    def load(self, state: state_lib.TrainState) -> None:
        """See `Engine`."""
        spec = self._spec
        self._feed.begin(first_step(state))
        self._like = jax.eval_shape(lambda: state)
        self._states, self._teachers = [], []
        for segment, mesh in zip(self._segments, self._meshes, strict=True):
            names = segments.student_names(spec, segment)
            own = segments.state_of(spec, state, segment)
            own = segments.renamed_state(names.remove, own)
            self._states.append(mesh_lib.replicate(own, mesh))
            names = segments.teacher_names(spec, segment)
            part = segments.teacher_of(spec, self._teacher, segment)
            part = segments.renamed_teacher(names.remove, part)
            self._teachers.append(mesh_lib.replicate(part, mesh))
        alike = [self._signature(k) for k in range(len(self._segments))]
        # Of modules that differ only by their names the first one's program serves all.
        self._as = [alike.index(signature) for signature in alike]

    def close(self) -> None:
        """See `Engine`."""
        self._feed.close()

    def state(self) -> state_lib.TrainState:
        """See `Engine`."""
        parts = []
        for segment, state in zip(self._segments, self._states, strict=True):
            names = segments.student_names(self._spec, segment)
            parts.append(segments.renamed_state(names.restore, state))
        joined = segments.joined(self._like, *parts)
        return jax.device_put(joined, _whole(self._spec.mesh))

    def run(self, rows: np.ndarray) -> Any:
        """See `Engine`; one row at a time."""
        (row,) = rows
        data = self._feed.next(rows)
        if self._meshes[0] != self._spec.mesh:  # a no-op for what is there already
            data = jax.device_put(data, _whole(self._meshes[0]))
        if row.shape not in self._programs:
            # All before the first one runs: a stop while compiling finds whole steps.
            self._programs[row.shape] = self._compile(row, data)
        begin, programs = self._programs[row.shape]
        self._ran = [begin, *programs]
        below, batch = begin(self._states[0].step, data, row)
        metrics = []
        for k, program in enumerate(programs):
            below, batch = jax.device_put((below, batch), self._shardings(k, len(row)))
            own = (self._states[k], self._teachers[k])
            self._states[k], below, found = program(*own, below, batch)
            metrics.append(found)
        return metrics

    def read(self, pending: Any) -> Metrics:
        """See `Engine`."""
        found: Any = segments.flat_metrics(self._segments, jax.device_get(pending))
        return found

    def costs(self) -> Costs:
        """See `Engine`."""
        return _costs(self._ran)

    def _signature(self, k: int) -> Any:
        """Returns what is equal for modules that one program can run."""
        ends = (k == 0, k + 1 == len(self._segments))
        if self._spec.starts or any(ends):
            return k  # it has a schedule of its own, the stem or the head
        trees = (self._states[k], self._teachers[k])
        return jax.tree.structure(trees), _shapes(trees)

    def _compile(
        self, row: np.ndarray, data: device.DeviceData
    ) -> tuple[Any, list[Any]]:
        """The programs for a batch of this size: what feeds the modules, and theirs."""
        first_learner = dataclasses.replace(self._spec, mesh=self._meshes[0])
        begin = functools.partial(segments.start, first_learner)
        arguments = (self._states[0].step, data, row)
        below, batch = jax.eval_shape(begin, *arguments)
        places = self._shardings(0, len(row))
        start = _compiled(jax.jit(begin, out_shardings=places), arguments, self._guard)
        compiled: dict[Any, Any] = {}
        programs = []
        for k, (mesh, first) in enumerate(zip(self._meshes, self._as, strict=True)):
            places = self._shardings(k, len(row))
            below, batch = _placed((below, batch), places)
            arguments = (self._states[k], self._teachers[k], below, batch)
            program = self._module_program(first, mesh, len(row))
            _, above, _ = jax.eval_shape(program, *arguments)
            key = (first, tuple(mesh.devices.flat), _shapes(below), _shapes(above))
            if key not in compiled:
                compiled[key] = _compiled(program, arguments, self._guard)
            programs.append(compiled[key])
            below = above
        return start, programs

    def _module_program(self, k: int, mesh: Mesh, examples: int) -> Any:
        spec, segment = self._spec, self._segments[k]
        names = segments.student_names(spec, segment)
        theirs = segments.teacher_names(spec, segment)

        def update(
            state: state_lib.TrainState, teacher: PyTree, below: Any, batch: Any
        ) -> tuple[state_lib.TrainState, segments.Boundary, segments.Metrics]:
            state = segments.renamed_state(names.restore, state)
            teacher = {
                kind: theirs.restore(tree)["student"] for kind, tree in teacher.items()
            }
            state, above, metrics = step.segment_step(
                spec, segment, state, teacher, below, batch
            )
            state = segments.renamed_state(names.remove, state)
            return state, above, jax.tree.map(lambda m: m[None], metrics)

        shardings = (_whole(mesh), _split(mesh, examples), _whole(mesh))
        return jax.jit(update, donate_argnums=0, out_shardings=shardings)

    def _shardings(
        self, k: int, examples: int
    ) -> tuple[segments.Boundary, segments.Batch]:
        """Where module `k` finds the boundary below it and the batch."""
        split: Any = _split(self._meshes[k], examples)
        whole: Any = _whole(self._meshes[k])
        return segments.Boundary(split, split), segments.Batch(split, split, whole)


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns the shapes in `tree` with the places that the arrays will have."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _shapes(tree: PyTree) -> tuple:
    return tuple(x.shape for x in jax.tree.leaves(tree))


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
    return mesh_lib.over_batch(mesh) if examples % mesh.size == 0 else _whole(mesh)
