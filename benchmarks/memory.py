"""Measures temporary memory of the training step, by modules and by engine.

    python -m benchmarks.memory --pair=resnet56,resnet56 --batch=128 --modules=1,3,4,9

For each number of modules, cut so that activations are balanced, this prints what the
compiler counts: for the fused program, for the largest of the dispatched ones, and for
the largest of those if the teacher's outputs are inputs. Shares are relative to one
module. On CPU the compiler orders operations for concurrency by default, which keeps
more of them in memory; set

    XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false

for the order that it uses to save memory.
"""

import argparse
import functools

import jax
import numpy as np

from benchmarks import ours
from lakd_jax.config import resolved
from lakd_jax.runtime import backend, interrupt
from lakd_jax.training import segments, setup, teacher_outputs
from lakd_jax.training import step as step_lib


def cut(chosen: argparse.Namespace, count: int, engine: str) -> resolved.Config:
    """Returns the configuration of LAKD with `count` modules."""
    teacher, student = chosen.pair.split(",")
    where = {"local.granularity": "bytes", "local.modules": count}
    if count == 1:
        where = {"local.granularity": "none"}
    changes = {**where, "local.engine": engine}
    pair = (teacher, student, "lakd")
    return ours.configure(*pair, chosen.batch, chosen.dtype, changes)


def of_engine(chosen: argparse.Namespace, count: int, engine: str) -> float:
    """Returns MiB of the largest program of a step with `count` modules."""
    config = cut(chosen, count, engine)
    made = ours.setup(config)
    run = setup.engine(
        config, made.spec, made.teacher, made.device_data, interrupt.Guard()
    )
    run.load(made.state)
    run.run(np.zeros((1, chosen.batch), np.int32))
    return run.costs().temporary / 2**20


def of_students(chosen: argparse.Namespace, count: int) -> float:
    """Returns MiB of the largest dispatched program with teacher outputs as inputs."""
    made = ours.setup(cut(chosen, count, "dispatch"))
    spec = made.spec
    rows = np.zeros(chosen.batch, np.int32)
    cached_outputs = jax.eval_shape(
        functools.partial(teacher_outputs.compute_outputs, spec),
        *(made.teacher, made.device_data, rows, rows),
    )
    step = made.state.step
    start = functools.partial(segments.start, spec)
    below, batch = jax.eval_shape(start, step, made.device_data, rows)
    largest = 0
    for segment in segments.of_student(spec):
        state = segments.state_of(spec, made.state, segment)
        module = functools.partial(step_lib.segment_step, spec, segment)
        arguments = (state, cached_outputs, below, batch)
        program = jax.jit(module, donate_argnums=0).lower(*arguments)
        compiled = program.compile(compiler_options=backend.compiler_options())
        largest = max(largest, compiled.memory_analysis().temp_size_in_bytes)
        below = jax.eval_shape(module, *arguments)[1]
    return largest / 2**20


def main() -> None:
    """Prints a row for each number of modules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="resnet56,resnet56", help="TEACHER,STUDENT")
    parser.add_argument("--batch", default=128, type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--modules", default="1,3,4,9")
    chosen = parser.parse_args()
    print(f"{chosen.pair}, batch {chosen.batch}, {jax.devices()[0].device_kind}")
    print("| modules | fused MiB | of one | dispatched MiB | of one | its student | |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    first: dict[int, float] = {}
    for count in map(int, chosen.modules.split(",")):
        cells = []
        sizes = [of_engine(chosen, count, e) for e in ("fused", "dispatch")]
        for i, size in enumerate([*sizes, of_students(chosen, count)]):
            share = size / first.setdefault(i, size)
            cells += [f"{size:.0f}", f"{100 * share:.0f} %"]
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
