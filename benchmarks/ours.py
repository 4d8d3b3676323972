"""Builds and compiles our training step on random or given images, as training does."""

import dataclasses
import functools
import itertools
import time
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import work as work_lib
from lakd_jax import config as config_lib
from lakd_jax import data, distill, interop
from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.interop import weights
from lakd_jax.models import folding
from lakd_jax.runtime import backend
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import setup as setup_lib
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib
from lakd_jax.training import step

PyTree = Any

EXAMPLES = 10_000
CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Setup:
    """Images, weights and recipe, the same for all that are measured.

    Attributes:
      config: resolved.
      split: images (N, 32, 32, 3) uint8 and labels, on the host.
      state: ours before the first step.
      teacher: variables as the step takes them, batch norms folded; None without.
      teacher_torch: the teacher in PyTorch's names, not folded; None without.
    """

    config: resolved.Config
    split: data.Split
    spec: spec_lib.StepSpec
    device_data: device.DeviceData
    state: state_lib.TrainState
    teacher: PyTree
    teacher_torch: dict[str, np.ndarray] | None

    @property
    def student_torch(self) -> dict[str, np.ndarray]:
        """Returns the student before the first step, in PyTorch's names."""
        variables = self.state.variables("student")
        return interop.to_torch(self.config.student.name, jax.device_get(variables))

    def rows(self, count: int, seed: int) -> np.ndarray:
        """Returns positions (count, B) of random examples."""
        shape, most = (count, self.config.batch_size), len(self.split)
        return np.random.default_rng(seed).integers(0, most, shape, np.int32)

    def work(self, order: np.ndarray, *, anew: bool) -> work_lib.Work:
        """Returns what others need to train the same (see `work.Work`)."""
        c = self.config
        adapters: tuple[Any, ...] = ()
        if c.method == "lakd":
            method = jax.device_get(self.state.params["method"])
            adapters = tuple(method[f"module{k}"]["adapter"] for k in (1, 2, 3))
        return work_lib.Work(
            platform=jax.default_backend(),
            teacher=c.teacher.name,
            student=c.student.name,
            method=c.method,
            dtype=c.dtype,
            methods={name: dict(c.methods[name]) for name in ("kd", "lakd")},
            images=self.split.images,
            labels=self.split.labels,
            classes=_classes(self.split),
            order=order,
            anew=anew,
            mean=tuple(c.data.mean),
            std=tuple(c.data.std),
            pad=c.data.pad,
            flip=c.data.flip,
            lr=c.optim.lr,
            momentum=c.optim.momentum,
            weight_decay=c.optim.weight_decay,
            student_weights=self.student_torch,
            teacher_weights=self.teacher_torch,
            adapters=adapters,
            seed=c.seed,
        )


def configure(
    teacher: str,
    student: str,
    method: str,
    batch: int,
    dtype: str,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> resolved.Config:
    """Returns the default recipe for this pair, with `changes` by field."""
    config = config_lib.with_pair(config_lib.default(), f"{teacher},{student},{method}")
    changes = {"batch_size": batch, "dtype": dtype, **changes}
    return resolved.resolve(config_lib.changed(config, changes))


def typed(fields: Mapping[str, str]) -> dict[str, Any]:
    """Returns fields of the config given as text, in the types that they have."""
    known = config_lib.flat(config_lib.default())
    return {
        name: text == "True"
        if isinstance(known[name], bool)
        else type(known[name])(text)
        for name, text in fields.items()
    }


def setup(config: resolved.Config, split: data.Split | None = None) -> Setup:
    """Makes weights, and random images without a split, on one device.

    The teacher is that of `teacher.init`, if given, and folded if that is set.
    """
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
    split = _images() if split is None else split
    classes = _classes(split)
    student, teacher = _network(config, "student", classes), None
    original = None
    if distill.facts(config.method).needs_teacher:
        teacher = _with_weights(_network(config, "teacher", classes))
        original = interop.to_torch(config.teacher.name, teacher.variables or {})
        if config.teacher.fold:
            model, variables = folding.fold(teacher.model, teacher.variables)
            teacher = dataclasses.replace(teacher, model=model, variables=variables)
    spec, first_state = setup_lib.spec(
        config,
        student,
        teacher,
        teacher_pixels=setup_lib.pixels(config),
        image_shape=split.images.shape[1:],
        steps_per_epoch=len(split) // config.batch_size,
        examples=len(split),
        mesh=mesh,
    )
    return Setup(
        config,
        split,
        spec,
        device.device_data(split, config.seed, mesh),
        first_state(),
        mesh_lib.replicate(teacher.variables, mesh) if teacher else None,
        original,
    )


def _images() -> data.Split:
    rng = np.random.default_rng(0)
    return data.Split(
        rng.integers(0, 256, (EXAMPLES, 32, 32, 3), np.uint8),
        rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
        np.arange(EXAMPLES, dtype=np.int32),
    )


def _classes(split: data.Split) -> int:
    return int(split.labels.max()) + 1


def _network(config: resolved.Config, part: str, classes: int) -> weights.Loaded:
    network = getattr(config, part)
    return weights.load(
        part,
        network.name,
        network.init,
        dtype=config.dtype,
        num_classes=classes,
        options=setup_lib.network_options(config, part),
        data_size=32,
    )


def _with_weights(loaded: weights.Loaded) -> weights.Loaded:
    if loaded.variables is not None:
        return loaded
    init = jax.jit(functools.partial(loaded.model.init, train=False))
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.device_get(init(jax.random.key(0), images))
    return dataclasses.replace(loaded, variables=variables)


class Ours:
    """Our step, compiled when the object is made; a `timing.Subject`.

    The steps are on the rows of `order` (S, B), whose number is a multiple of
    `steps_per_dispatch`; the first is made alone.

    Attributes:
      facts: figures that are known before timing, for the record.
    """

    name = "ours"

    def __init__(self, made: Setup, steps_per_dispatch: int, order: np.ndarray):
        self._made = made
        # The step donates its state, and others start from the same one.
        self._state = mesh_lib.replicate(made.state, made.spec.mesh)
        began = time.perf_counter()
        one = self._compile(1)
        compiled = time.perf_counter() - began
        self._program, self._several = one, steps_per_dispatch
        self._batches = itertools.cycle(order[:, None])
        self.run(1)
        self.facts = {
            "compile_s": compiled,
            "first_step_s": time.perf_counter() - began,
            "steps_per_dispatch": steps_per_dispatch,
            **_costs(one),
        }
        if steps_per_dispatch > 1:
            began = time.perf_counter()
            self._program = self._compile(steps_per_dispatch)
            self.facts["compile_dispatch_s"] = time.perf_counter() - began
            rows = order.reshape(-1, steps_per_dispatch, order.shape[1])
            self._batches = itertools.cycle(rows)

    def run(self, steps: int) -> None:
        """Runs at least `steps` steps, in whole dispatches, and waits for the last."""
        metrics: Any = None
        for _ in range(-(-steps // self._several)):
            self._state, metrics = self._program(
                self._state,
                self._made.teacher,
                self._made.device_data,
                next(self._batches),
            )
        jax.block_until_ready((self._state, metrics))

    def peak_bytes(self) -> int | None:
        """Returns the peak since the process began, if the device counts it."""
        stats = jax.local_devices()[0].memory_stats()
        return stats.get("peak_bytes_in_use") if stats else None

    def predict(self, images: np.ndarray) -> np.ndarray:
        """See `timing.Subject`."""
        variables = self._state.variables("student")
        apply = jax.jit(functools.partial(self._made.spec.student.apply, train=False))
        parts = np.array_split(images, -(-len(images) // 256))
        return np.concatenate([apply(variables, part).logits for part in parts])

    def _compile(self, count: int) -> Any:
        made = self._made
        return (
            jax.jit(
                functools.partial(step.run_steps, made.spec),
                donate_argnums=0,
                out_shardings=NamedSharding(made.spec.mesh, PartitionSpec()),
            )
            .lower(self._state, made.teacher, made.device_data, made.rows(count, 0))
            .compile(compiler_options=backend.compiler_options())
        )


def _costs(program: Any) -> dict[str, float]:
    """Returns XLA's counts for a program of one step (a loop counts as one turn)."""
    costs, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "flops": costs["flops"],
        "bytes": costs["bytes accessed"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }
