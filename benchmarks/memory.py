"""Temporary memory of the training step, by where the student is cut and by engine.

    python -m benchmarks.memory --pair=resnet56,resnet56 --batch=128 --modules=1,3,4,9

For each number of modules, cut so that activations are balanced, the compiler's own
count: of the fused program, and of the largest of the dispatched ones. Shares are of
the program with one module. On CPU the compiler's default is to order operations for
concurrency, which keeps more alive: give

    XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false

for the order that it uses where memory matters.
"""

import argparse

import jax
import numpy as np

from benchmarks import ours
from lakd_jax import config as config_lib
from lakd_jax.train import build


def temporary(chosen: argparse.Namespace, count: int, engine: str) -> float:
    """MiB of the largest program of a step with `count` modules."""
    teacher, student = chosen.pair.split(",")
    config = ours.configure(teacher, student, "lakd", chosen.batch, chosen.dtype)
    cut = {"local.granularity": "bytes", "local.modules": count}
    if count == 1:
        cut = {"local.granularity": "none"}
    config = config_lib.changed(config, {**cut, "local.engine": engine})
    made = ours.setup(config)
    run = build.engine(
        config, made.learner, made.teacher, made.resident, lambda compile: compile()
    )
    run.load(made.state)
    run.run(np.zeros((1, chosen.batch), np.int32))
    return run.costs().temporary / 2**20


def main() -> None:
    """Prints a row for each number of modules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="resnet56,resnet56", help="TEACHER,STUDENT")
    parser.add_argument("--batch", default=128, type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--modules", default="1,3,4,9")
    chosen = parser.parse_args()
    print(f"{chosen.pair}, batch {chosen.batch}, {jax.devices()[0].device_kind}")
    print("| modules | fused MiB | of one | dispatched MiB | of one |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    first: dict[str, float] = {}
    for count in map(int, chosen.modules.split(",")):
        cells = []
        for engine in ("fused", "dispatch"):
            size = temporary(chosen, count, engine)
            share = size / first.setdefault(engine, size)
            cells += [f"{size:.0f}", f"{100 * share:.0f} %"]
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
