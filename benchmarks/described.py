"""The programs of training and evaluation for described chips, as shapes.

Built as a run builds them, up to the compiler; see `benchmarks.aot`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks import ours
from configs import imagenet_lakd
from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.interop import weights
from lakd_jax.models import chain, folding
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import evaluate, setup
from lakd_jax.training import state as state_lib

PROGRAMS = ("fused", "many", "dispatch", "evaluation")
EVALUATED = 512  # images in a batch of the evaluation, or one for each chip
STEPS = 50  # most steps of the program "many"


@dataclasses.dataclass(frozen=True)
class Case:
    """Networks and images.

    Attributes:
      pair: TEACHER,STUDENT.
      image: (H, W, 3).
      classes, examples: numbers of classes and of training images.
      streamed: whether a step gets its batch, or the whole split.
    """

    pair: str
    image: tuple[int, int, int]
    classes: int
    examples: int
    streamed: bool = False


CASES = {
    "tiny": Case("resnet8,resnet8", (32, 32, 3), 10, 10_000),
    "cifar": Case("resnet56,resnet20", (32, 32, 3), 100, 45_000),
    "imagenet": Case(
        "resnet34,resnet18", (224, 224, 3), 1000, 1_281_167, streamed=True
    ),
}


# What the compiler asks of a GPU, by NVIDIA on H200 and on compute capability 9.0.
_H200 = """
gpu_device_info {
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 }
  device_memory_size: 150754820096
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
"""


def mesh(topology: str, slices: int = 1) -> jax.sharding.Mesh:
    """Returns chips as training uses them: of TPUs, such as v5e:2x4, or h200:COUNT.

    Raises:
      RuntimeError: libtpu (JAX's CUDA plugin) is missing, or does not know them.
    """
    kind, _, count = topology.partition(":")
    if kind == "h200":
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x1x{count}",
            target_config=_H200,
        )
        return jax.sharding.Mesh(np.array(found.devices), ("data",))
    extra = {"num_slices": slices} if slices > 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **extra
    )
    return jax.sharding.Mesh(np.array(mesh_lib.by_process(found.devices)), ("data",))


def configure(
    case: str,
    pair: str,
    method: str,
    program: str,
    batch: int,
    fields: Mapping[str, str],
) -> resolved.Config:
    """Returns the recipe of a case in bfloat16.

    Args:
      case: one of `CASES`.
      pair: TEACHER,STUDENT; "" for the case's.
      method: of distillation.
      program: one of `PROGRAMS`.
      batch: examples of a step, on all chips.
      fields: further fields of the config.
    """
    config = config_lib.default()
    if case == "imagenet":
        config = imagenet_lakd.get_config()
        config.teacher.init = ""
    config = config_lib.with_pair(config, f"{pair or CASES[case].pair},{method}")
    changes: dict[str, Any] = {
        "batch_size": batch,
        "dtype": "bfloat16",
        "local.engine": "dispatch" if program == "dispatch" else "fused",
    }
    changes |= ours.typed(fields)
    return resolved.resolve(config_lib.changed(config, changes))


@dataclasses.dataclass(frozen=True)
class Described:
    """What a run would compile.

    Attributes:
      config: resolved.
      case: of the images.
      mesh: the chips.
    """

    config: resolved.Config
    case: Case
    mesh: jax.sharding.Mesh

    def programs(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Yields those of one of `PROGRAMS`, by name, before they are compiled."""
        config = self.config
        student, teacher = self._network("student"), None
        if distill.facts(config.method).needs_teacher:
            teacher = self._teacher()
        spec, first = setup.spec(
            config,
            student,
            teacher,
            teacher_pixels=setup.pixels(config),
            image_shape=self.case.image,
            steps_per_epoch=self.case.examples // config.batch_size,
            examples=self.case.examples,
            mesh=self.mesh,
        )
        state = mesh_lib.described(first.shapes(), self.mesh)
        if kind == "evaluation":
            yield kind, self._evaluation(student.model, state)
            return
        variables = teacher and mesh_lib.described(teacher.variables, self.mesh)
        arguments = (spec, variables, self._data(config.batch_size))
        most = STEPS if kind == "many" else 1
        engine = setup.engine(config, *arguments, interrupt.Guard(), most=most)
        yield from engine.lowered(state, np.zeros((1, config.batch_size), np.int32))

    def _evaluation(self, model: chain.Chain, state: state_lib.TrainState) -> Any:
        size = max(EVALUATED, self.mesh.size)
        pixels = setup.pixels(self.config)
        arguments = (model, pixels, size, self.mesh, interrupt.Guard())
        rows, mask = np.zeros(size, np.int32), np.ones(size, bool)
        return evaluate.Evaluator(*arguments).lowered(
            state.variables("student"), self._data(size), rows, mask, None
        )

    def _network(self, part: str) -> weights.Loaded:
        return weights.load(
            part,
            getattr(self.config, part).name,
            "",
            dtype=self.config.dtype,
            num_classes=self.case.classes,
            options=setup.network_options(self.config, part),
            data_size=self.case.image[0],
        )

    def _teacher(self) -> weights.Loaded:
        """Returns the teacher with shapes in place of weights, folded as in a run."""
        loaded = self._network("teacher")
        images = jnp.zeros((1, *self.case.image))
        init = functools.partial(loaded.model.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), images)
        if not self.config.teacher.fold:
            return dataclasses.replace(loaded, variables=variables)
        models = []

        def fold(variables: Any) -> Any:
            model, folded = folding.fold(loaded.model, variables)
            models.append(model)
            return folded

        variables = jax.eval_shape(fold, variables)
        return dataclasses.replace(loaded, model=models[0], variables=variables)

    def _data(self, batch: int) -> device.DeviceData:
        """Returns the shapes of a split on the devices, or of a streamed batch."""
        case, whole = self.case, mesh_lib.replicated(self.mesh)
        count, where, image = case.examples, whole, (int(np.prod(case.image)),)
        if case.streamed:
            count, where = batch, mesh_lib.of_batch(self.mesh, batch)
            image = case.image

        def array(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        numbers = array((count,), jnp.int32, where)
        key = array((), jax.random.key(0).dtype, whole)
        images = array((count, *image), jnp.uint8, where)
        return device.DeviceData(
            images, numbers, numbers, key, key, case.image, whole=case.streamed
        )
