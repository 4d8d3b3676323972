"""Times a CIFAR training step and its input part, in turn, in one process.

    python -m benchmarks.step --student=resnet8 --teacher=resnet20 --method=kd

Images are random, 32x32; the input part is gathering, cropping, mirroring and
normalising a batch on the device. Prints the medians and the share of the input.
`--views=1` stores the teacher's outputs before, as `teacher.views` does, and `--plain`
leaves out the settings of `lakd_jax.runtime.backend`, to show what they gain.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import ours
from lakd_jax import distill
from lakd_jax.data import device
from lakd_jax.runs import teacher_cache
from lakd_jax.runtime import backend, interrupt
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib
from lakd_jax.training import step, teacher_outputs

ASKED = 500  # images of one batch of teacher outputs


def programs(made: ours.Setup, options: dict[str, Any]) -> dict[str, Callable]:
    """Returns compiled functions by name; each runs once and waits for the device.

    Args:
      made: networks and data.
      options: of the compiler.
    """
    spec, rows = made.spec, made.rows(1, 0)
    source = stored(made) if spec.views else made.teacher

    def whole(
        s: state_lib.TrainState, source: Any, d: device.DeviceData, r: Any
    ) -> Any:
        return step.run_steps(spec, s, source, d, r)

    def only_input(
        s: state_lib.TrainState, _: Any, d: device.DeviceData, r: Any
    ) -> Any:
        images, labels = spec_lib.batch(spec, s.step, d, r[0])
        return spec.student_pixels(images), labels

    def run(function: Callable) -> Callable[[], Any]:
        arguments = (made.state, source, made.device_data, rows)
        program = jax.jit(function).lower(*arguments)
        program = program.compile(compiler_options=options)
        return lambda: jax.block_until_ready(program(*arguments))

    return {"step": run(whole), "input": run(only_input)}


def stored(made: ours.Setup) -> teacher_outputs.TeacherOutputs:
    """Returns the teacher's outputs, stored and read as in a run."""
    spec, guard = made.spec, interrupt.Guard()
    computer = teacher_cache.OutputsComputer(
        spec, made.teacher, made.device_data, ASKED, guard
    )
    names = {"teacher": made.config.teacher.name, "data": "random", "seed": 0}
    key = teacher_cache.settings(spec, made.teacher, computer.shapes(), **names)
    with tempfile.TemporaryDirectory() as cache:
        return teacher_cache.kept(
            pathlib.Path(cache), computer, key, made.split.labels, print
        )


def main() -> None:
    """Prints milliseconds of a step and of its input, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--method", default="lakd", choices=distill.names())
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--repeats", default=20, type=int)
    parser.add_argument("--views", default=0, type=int, help="teacher.views")
    parser.add_argument("--set", default=[], action="append", metavar="FIELD=VALUE")
    parser.add_argument("--plain", action="store_true", help="JAX's own settings")
    chosen = parser.parse_args()
    config = ours.configure(
        chosen.teacher,
        chosen.student,
        chosen.method,
        chosen.batch_size,
        "float32",
        {"teacher.views": chosen.views}
        | ours.typed(dict(text.split("=", 1) for text in chosen.set)),
    )
    if not chosen.plain:
        backend.prepare(cache="")
    options = {} if chosen.plain else backend.compiler_options()
    made = programs(ours.setup(config), options)
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
