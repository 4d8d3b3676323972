"""Executes the steps of a run, in one compiled program or in one per module.

All engines make the same steps. `Fused` compiles one program for the whole step and, on
accelerators, for many steps. `Modules` compiles one program per module, so that memory
holds the activations of only one module at a time. Identical modules share a program,
since their variables are passed by position. With `devices` it is a pipeline: module k
of student and teacher stays on one device, and only the boundary between modules is
transferred. Because nothing flows back, module k works on a batch while module k - 1
works on the next.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

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
    """The compiler's cost estimate for one step: FLOPs, and bytes per device."""

    flops: float
    arguments: int
    temporary: int


class Engine(abc.ABC):
    """Runs training steps on behalf of the training loop."""

    def __init__(
        self,
        spec: spec_lib.StepSpec,
        source: PyTree,
        data: device.DeviceData | feeds.Run,
        guard: interrupt.Guard,
    ):
        """`source` is the teacher's variables, or what else steps take for it."""
        self._spec, self._teacher, self._guard = spec, source, guard
        self._feed = feeds.feed(data)
        self._programs: dict[tuple[int, ...], Any] = {}  # by the shape of the rows
        self._last: list[Any] = []  # the programs of the last step

    @abc.abstractmethod
    def load(self, state: state_lib.TrainState) -> None:
        """Starts from `state`, which must not be used afterwards."""

    @abc.abstractmethod
    def lowered(
        self, state: state_lib.TrainState, rows: np.ndarray
    ) -> Iterator[tuple[str, Any]]:
        """Yields the programs of `run`, by name, before they are compiled.

        Nothing is computed: teacher, data and `state` may be shapes, with shardings.
        """

    @abc.abstractmethod
    def run(self, rows: np.ndarray) -> Any:
        """Starts one step per row of `rows` (n, B), positions in the training split.

        A batch that is filled up has -1 at the end, see `segments.start`.
        Returns without waiting; pass the result to `read`.
        """

    @abc.abstractmethod
    def read(self, pending: Any) -> Metrics:
        """Waits for the steps that `run` started, and returns their metrics (n,)."""

    def together(self, count: int) -> int:
        """Returns how many of the next `count` steps `run` takes at once."""
        return 1

    @abc.abstractmethod
    def state(self) -> state_lib.TrainState:
        """Returns the state after all steps so far; valid until the next `run`."""

    def costs(self) -> Costs:
        """Returns the FLOPs of the last step, and the memory of its largest program."""
        memory = [program.memory_analysis() for program in self._last]
        costs = [program.cost_analysis() for program in self._last]
        return Costs(
            flops=sum(cost.get("flops", float("nan")) for cost in costs),
            arguments=max(m.argument_size_in_bytes for m in memory),
            temporary=max(m.temp_size_in_bytes for m in memory),
        )

    def close(self) -> None:
        """Stops prefetching and releases its workers."""
        self._feed.close()

    def _begin(self, state: state_lib.TrainState) -> None:
        """Prepares the data of the step that follows `state`."""
        self._feed.begin(int(jax.device_get(mesh_lib.on_one_device(state.step))))


class Fused(Engine):
    """Runs each step as one compiled program, or many steps as one.

    On accelerators one program runs any number of steps up to `most`. On CPU, where
    loops are unrolled, it runs `most` steps or one.
    """

    def __init__(self, *arguments: Any, most: int = 1):
        """Creates the engine; `most` steps are run by a program, see `Engine`."""
        super().__init__(*arguments)
        self._most = most
        self._loops = most > 1 and not backend.on_cpu(self._spec.mesh)

    def load(self, state: state_lib.TrainState) -> None:
        """See `Engine`."""
        self._begin(state)
        self._state = state

    def state(self) -> state_lib.TrainState:
        """See `Engine`."""
        return self._state

    def lowered(
        self, state: state_lib.TrainState, rows: np.ndarray
    ) -> Iterator[tuple[str, Any]]:
        """See `Engine`."""
        yield "fused", self._lower(self._arguments(state, rows))

    def run(self, rows: np.ndarray) -> Any:
        """See `Engine`."""
        arguments = self._arguments(self._state, rows)
        shape = arguments[3].shape
        if shape not in self._programs:
            lowered = self._lower(arguments)
            self._programs[shape] = backend.compiled(lowered, self._guard)
        program = self._programs[shape]
        self._last = [program]
        self._state, metrics = program(*arguments)
        return metrics, len(rows)

    def _arguments(
        self, state: state_lib.TrainState, rows: np.ndarray
    ) -> tuple[Any, ...]:
        """Returns the arguments of `step.run_steps`."""
        arguments = (state, self._teacher, self._feed.next(rows))
        if not self._loops:
            return (*arguments, rows)
        padding = ((0, self._most - len(rows)), (0, 0))
        return (*arguments, np.pad(rows, padding), np.int32(len(rows)))

    def _lower(self, arguments: tuple[Any, ...]) -> Any:
        program = jax.jit(
            functools.partial(step.run_steps, self._spec),
            donate_argnums=0,
            out_shardings=mesh_lib.replicated(self._spec.mesh),
        )
        return program.lower(*arguments)

    def read(self, pending: Any) -> Metrics:
        """See `Engine`."""
        metrics, count = pending
        return {name: x[:count] for name, x in jax.device_get(metrics).items()}

    def together(self, count: int) -> int:
        """See `Engine`."""
        if self._loops:
            return min(count, self._most)
        return self._most if count >= self._most else 1


class Modules(Engine):
    """Runs each step as one compiled program per module; see the module docstring."""

    def __init__(
        self,
        spec: spec_lib.StepSpec,
        source: PyTree,
        data: device.DeviceData | feeds.Run,
        guard: interrupt.Guard,
        devices: Sequence[Any] = (),
    ):
        """Creates the engine.

        Args:
          devices: the devices of a pipeline, among which the modules are distributed in
            order; () runs each module on all devices of the mesh.

        Raises:
          ValueError: a module needs more of the others than the boundary below it.
        """
        if not spec.isolated:
            raise ValueError("interdependent modules need local.engine=fused")
        self._segments = segments.of_student(spec)
        count = len(self._segments)
        self._meshes = [spec.mesh] * count
        if devices:
            places = [devices[k * len(devices) // count] for k in range(count)]
            self._meshes = [Mesh(np.array([d]), ("data",)) for d in places]
            if isinstance(data, device.DeviceData):
                data = jax.device_put(data, mesh_lib.replicated(self._meshes[0]))
        super().__init__(spec, source, data, guard)

    def load(self, state: state_lib.TrainState) -> None:
        """See `Engine`."""
        self._begin(state)
        self._like = jax.eval_shape(lambda: state)
        self._divide(state, mesh_lib.replicate)

    def _divide(
        self, state: state_lib.TrainState, put: Callable[[PyTree, Mesh], PyTree]
    ) -> None:
        """Gives each module its part of the state and of the teacher's variables."""
        spec = self._spec
        self._states, self._teachers = [], []
        for segment, mesh in zip(self._segments, self._meshes, strict=True):
            names = segments.student_names(spec, segment)
            part = segments.state_of(spec, state, segment)
            self._states.append(put(segments.renamed_state(names.remove, part), mesh))
            names = segments.teacher_names(spec, segment)
            part = segments.teacher_of(spec, self._teacher, segment)
            part = segments.renamed_teacher(names.remove, part)
            self._teachers.append(put(part, mesh))

    def state(self) -> state_lib.TrainState:
        """See `Engine`."""
        parts = []
        for segment, state in zip(self._segments, self._states, strict=True):
            names = segments.student_names(self._spec, segment)
            parts.append(segments.renamed_state(names.restore, state))
        joined = segments.joined(self._like, *parts)
        return jax.device_put(joined, mesh_lib.replicated(self._spec.mesh))

    def run(self, rows: np.ndarray) -> Any:
        """See `Engine`; takes one row at a time."""
        (row,) = rows
        data = self._feed.next(rows)
        if self._meshes[0] != self._spec.mesh:  # a no-op for arrays already there
            data = jax.device_put(data, mesh_lib.replicated(self._meshes[0]))
        if row.shape not in self._programs:
            # All are compiled before the first one runs, so that an interrupt during
            # compilation finds only completed steps.
            self._programs[row.shape] = self._compile(row, data)
        begin, programs = self._programs[row.shape]
        self._last = [begin, *programs]
        below, batch = begin(self._states[0].step, data, row)
        metrics = []
        for k, program in enumerate(programs):
            below, batch = jax.device_put((below, batch), self._shardings(k, len(row)))
            variables = (self._states[k], self._teachers[k])
            self._states[k], below, values = program(*variables, below, batch)
            metrics.append(values)
        return metrics

    def read(self, pending: Any) -> Metrics:
        """See `Engine`."""
        metrics: Any = segments.flat_metrics(self._segments, jax.device_get(pending))
        return metrics

    def _compile(
        self, row: np.ndarray, data: device.DeviceData
    ) -> tuple[Any, list[Any]]:
        """Compiles the program that makes the batch, and those of all modules."""
        # Modules whose programs are the same to the letter share one. Equal shapes of
        # variables are not enough: one of them may pool its input, for example.
        (_, _, first), *others = self._lowered(row, data)
        start = backend.compiled(first, self._guard)
        compiled: dict[Any, Any] = {}
        programs = []
        for _, mesh, lowered in others:
            key = (tuple(mesh.devices.flat), lowered.as_text())
            if key not in compiled:
                compiled[key] = backend.compiled(lowered, self._guard)
            programs.append(compiled[key])
        return start, programs

    def lowered(
        self, state: state_lib.TrainState, rows: np.ndarray
    ) -> Iterator[tuple[str, Any]]:
        """See `Engine`."""
        self._divide(state, mesh_lib.described)
        (row,) = rows
        for name, _, lowered in self._lowered(row, self._feed.next(rows)):
            yield name, lowered

    def _lowered(
        self, row: np.ndarray, data: device.DeviceData
    ) -> Iterator[tuple[str, Mesh, Any]]:
        """Yields name, devices and program: what makes the batch, then each module."""
        first_spec = dataclasses.replace(self._spec, mesh=self._meshes[0])
        begin = functools.partial(segments.start, first_spec)
        arguments = (self._states[0].step, data, row)
        below, batch = jax.eval_shape(begin, *arguments)
        shardings = self._shardings(0, len(row))
        lowered = jax.jit(begin, out_shardings=shardings).lower(*arguments)
        yield "begin", self._meshes[0], lowered
        for k, mesh in enumerate(self._meshes):
            shardings = self._shardings(k, len(row))
            below, batch = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                (below, batch),
                shardings,
            )
            arguments = (self._states[k], self._teachers[k], below, batch)
            lowered = self._module_program(k, mesh, len(row)).lower(*arguments)
            yield f"module{k + 1}", mesh, lowered
            _, below, _ = lowered.out_info

    def _module_program(self, k: int, mesh: Mesh, examples: int) -> Any:
        spec = dataclasses.replace(self._spec, mesh=mesh)
        segment = self._segments[k]
        names = segments.student_names(spec, segment)
        teacher_names = segments.teacher_names(spec, segment)

        def update(
            state: state_lib.TrainState, teacher: PyTree, below: Any, batch: Any
        ) -> tuple[state_lib.TrainState, segments.Boundary, segments.Metrics]:
            state = segments.renamed_state(names.restore, state)
            teacher = {
                kind: teacher_names.restore(tree)["student"]
                for kind, tree in teacher.items()
            }
            state, above, metrics = step.segment_step(
                spec, segment, state, teacher, below, batch
            )
            state = segments.renamed_state(names.remove, state)
            return state, above, jax.tree.map(lambda m: m[None], metrics)

        shardings = (
            mesh_lib.replicated(mesh),
            mesh_lib.of_batch(mesh, examples),
            mesh_lib.replicated(mesh),
        )
        return jax.jit(update, donate_argnums=0, out_shardings=shardings)

    def _shardings(
        self, k: int, examples: int
    ) -> tuple[segments.Boundary, segments.Batch]:
        """Returns the shardings of module `k`'s inputs, boundary and batch."""
        over_batch: Any = mesh_lib.of_batch(self._meshes[k], examples)
        replicated: Any = mesh_lib.replicated(self._meshes[k])
        boundary = segments.Boundary(over_batch, over_batch)
        soft = over_batch if self._spec.mixing else None
        valid = replicated if self._spec.fills else None
        batch = segments.Batch(over_batch, over_batch, replicated, soft, valid)
        return boundary, batch
