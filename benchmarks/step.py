"""Times a CIFAR training step and its input part, in turn, in one process.

    python -m benchmarks.step --student=resnet8 --teacher=resnet20 --method=kd

Images are random, 32x32; the input part is gathering, cropping, mirroring and
normalising a batch on the device. Prints the medians and the share of the input.
`--plain` leaves out what `lakd_jax.backend` sets for the device, to see what it gains.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lakd_jax import backend, data, distill
from lakd_jax import config as config_lib
from lakd_jax.train import build, networks, step
from lakd_jax.train import learner as learner_lib
from lakd_jax.train import state as state_lib

EXAMPLES = 10_000


def programs(
    arg: str, batch_size: int, options: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Compiled functions by name; each runs once and waits for the device.

    `options` are the compiler's.
    """
    config = config_lib.with_pair(config_lib.default(), arg)
    config = config_lib.resolve(config_lib.changed(config, {"batch_size": batch_size}))
    mesh = state_lib.data_mesh()
    rng = np.random.default_rng(0)
    split = data.Split(
        rng.integers(0, 256, (EXAMPLES, 32, 32, 3), np.uint8),
        rng.integers(0, 100, EXAMPLES).astype(np.int32),
        np.arange(EXAMPLES, dtype=np.int32),
    )
    resident = state_lib.resident(split, 0, mesh)
    student, teacher = (_network(config, part) for part in ("student", "teacher"))
    if not distill.METHODS[config.method].needs_teacher:
        teacher = None
    learner, first_state = build.learner(
        config,
        student,
        teacher,
        teacher_pixels=build.pixels(config),
        image_shape=(32, 32, 3),
        steps_per_epoch=100,
        mesh=mesh,
    )
    variables = state_lib.replicate(teacher.variables, mesh) if teacher else None
    rows = rng.integers(0, EXAMPLES, (1, batch_size)).astype(np.int32)
    state = first_state()

    def whole(s: state_lib.TrainState, d: state_lib.Resident, r: Any) -> Any:
        return step.run_steps(learner, s, variables, d, r)

    def only_input(s: state_lib.TrainState, d: state_lib.Resident, r: Any) -> Any:
        images, labels = learner_lib.batch(learner, s.step, d, r[0])
        return learner.student_pixels(images), labels

    def run(function: Callable) -> Callable[[], Any]:
        lowered = jax.jit(function).lower(state, resident, rows)
        program = lowered.compile(compiler_options=options)
        return lambda: jax.block_until_ready(program(state, resident, rows))

    return {"step": run(whole), "input": run(only_input)}


def _network(config: config_lib.ConfigDict, part: str) -> networks.Loaded:
    loaded = networks.load(
        part,
        config[part].name,
        "",
        shortcut="projection",
        dtype=config.dtype,
        num_classes=100,
    )
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = loaded.model.init(jax.random.key(0), images, train=False)
    return networks.Loaded(loaded.model, variables, loaded.source)


def main() -> None:
    """Prints milliseconds of a step and of its input, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--method", default="lakd", choices=distill.names())
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--repeats", default=20, type=int)
    parser.add_argument("--plain", action="store_true", help="JAX's own settings")
    chosen = parser.parse_args()
    arg = f"{chosen.teacher},{chosen.student},{chosen.method}"
    if not chosen.plain:
        backend.prepare(cache="")
    options = {} if chosen.plain else backend.compiler_options()
    made = programs(arg, chosen.batch_size, options)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(chosen.repeats + 2):  # the first two warm up
        for name, program in made.items():
            began = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(t[2:]) for name, t in times.items()}
    for name, seconds in median.items():
        rate = chosen.batch_size / seconds
        print(f"{name:6} {1000 * seconds:8.2f} ms  {rate:10,.0f} images/s")
    print(f"input / step: {100 * median['input'] / median['step']:.2f} %")


if __name__ == "__main__":
    main()
