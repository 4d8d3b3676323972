"""Compiles what training runs for chips that are not here, and records what it costs.

    pip install "lakd-jax[tpu]"
    python -m benchmarks.aot --topology=v5e:2x4 --case=imagenet --method=lakd
    pip install jax-cuda13-plugin jax-cuda13-pjrt  # of JAX's version
    python -m benchmarks.aot --topology=h200:1 --case=cifar --method=lakd

Nothing runs and no weights are made: shapes with the shardings of training go through
the programs of the engines and of the evaluation, compiled by libtpu for the described
chips. Memory is what its compiler reserves. Times are its own estimate of cycles, and
the bound that the chip's arithmetic or memory sets. Compare figures only at the same
--level: O1 takes less than half the time to compile, and 1.4 to 1.6 times the cycles.
All figures are those of one chip. Of GPUs the compiler tells memory and collectives
only, without the scratch space of cuDNN, which is not asked. Programs:

    fused       one step
    many        up to 50 steps, in a loop; figures of one turn
    dispatch    a program per module
    evaluation  a batch of the test split
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import hlo

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # of this process, which only compiles
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a killed process leaves its lock file
}
_ENVIRONMENT_OF_GPU = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # there is nothing to try kernels on
}
_LEVELS = {
    "default": {},
    "O1": {"JAX_OPTIMIZATION_LEVEL": "O1", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1"},
}
_RESULTS = pathlib.Path(__file__).parent / "results" / "aot"
_LARGE = 1 << 24  # bytes from which a copy is worth a line
_SUMMED = ("flops", "bytes_accessed", "estimate_ms", "bound_ms")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its maker's pages.

    Attributes:
      flops: bfloat16 operations per second.
      bandwidth: bytes per second.
      products: multiplications per cycle of all matrix units.
      is_gpu: whether it is one; the others are TPUs.
    """

    flops: float
    bandwidth: float
    products: int
    is_gpu: bool = False

    @property
    def clock(self) -> float:
        """Returns cycles per second, which follow from `flops` and `products`."""
        return self.flops / (2 * self.products)


CHIPS = {
    "v5e": Chip(197e12, 819e9, 4 * 128**2),
    "v5p": Chip(459e12, 2765e9, 8 * 128**2),
    "v6e": Chip(918e12, 1640e9, 4 * 256**2),
    "h200": Chip(989e12, 4800e9, 132 * 4 * 512, is_gpu=True),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology", default="v5e:2x2", help="CHIP:AxB[xC]; h200:COUNT"
    )
    parser.add_argument("--slices", default=1, type=int)
    parser.add_argument("--case", default="cifar", help="tiny, cifar or imagenet")
    parser.add_argument("--pair", default="", help="TEACHER,STUDENT; of the case")
    parser.add_argument("--method", default="lakd")
    parser.add_argument("--program", default="fused", help="see above")
    parser.add_argument("--batch_per_chip", default=256, type=int)
    parser.add_argument("--level", default="default", choices=_LEVELS)
    parser.add_argument("--set", default=[], action="append", metavar="FIELD=VALUE")
    parser.add_argument("--note", default="", help="added to the record's name")
    parser.add_argument("--results", default=_RESULTS, type=pathlib.Path)
    chosen = parser.parse_args(argv)
    if faults := [text for text in chosen.set if "=" not in text]:
        parser.error(f"--set={faults[0]}: write FIELD=VALUE")
    if chosen.topology.split(":")[0] not in CHIPS:
        parser.error(f"--topology={chosen.topology}: known are {', '.join(CHIPS)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles, prints and records."""
    chosen = parse(argv)
    chip = CHIPS[chosen.topology.split(":")[0]]
    environment = _ENVIRONMENT_OF_GPU if chip.is_gpu else _ENVIRONMENT
    os.environ |= environment | _LEVELS[chosen.level]
    from benchmarks import described  # imports JAX, which reads the environment

    mesh = described.mesh(chosen.topology, chosen.slices)
    fields = dict(text.split("=", 1) for text in chosen.set)
    batch = chosen.batch_per_chip * mesh.size
    recipe = (chosen.case, chosen.pair, chosen.method, chosen.program, batch, fields)
    config = described.configure(*recipe)
    made = described.Described(config, described.CASES[chosen.case], mesh)
    found = []
    for name, lowered in made.programs(chosen.program):
        found.append({"name": name, **measure(lowered, chip)})
        print(json.dumps(found[-1]), flush=True)
    print(_write(chosen, fields, found))


def measure(lowered: Any, chip: Chip) -> dict[str, Any]:
    """Compiles a program and returns its figures."""
    began = time.perf_counter()
    program = lowered.compile()
    took = time.perf_counter() - began
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "compile_s": round(took, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "collectives": hlo.collectives(text),
        "float32_products": hlo.float32_products(text),
        "worst_padding": hlo.worst_padding(text),
        "copies": hlo.copies(text, _LARGE),
        **_speed(program.cost_analysis(), hlo.cycles(text), chip),
    }


def _speed(
    costs: dict[str, float], cycles: dict[str, int], chip: Chip
) -> dict[str, Any]:
    """Returns what a program takes by its compiler; nothing of it is told of GPUs."""
    if chip.is_gpu:
        return dict.fromkeys(_SUMMED)
    arithmetic = costs["flops"] / chip.flops
    traffic = costs["bytes accessed"] / chip.bandwidth
    return {
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "cycles": cycles,
        "estimate_ms": round(1e3 * sum(cycles.values()) / chip.clock, 3),
        "bound_ms": round(1e3 * max(arithmetic, traffic), 3),
        "bound": "arithmetic" if arithmetic > traffic else "memory",
    }


def _write(
    chosen: argparse.Namespace, fields: dict[str, str], found: list[dict[str, Any]]
) -> pathlib.Path:
    """Writes a record: of several programs the sums, and the largest memory."""
    import jax

    kind = chosen.topology.replace(":", "-")
    kind += f"x{chosen.slices}" if chosen.slices > 1 else ""
    record = {
        "chip": kind,
        "case": chosen.case,
        "method": chosen.method,
        "program": chosen.program,
        "batch_per_chip": chosen.batch_per_chip,
        "level": chosen.level,
        "fields": fields,
        "jax": jax.__version__,
        **{
            name: max(one[name] for one in found)
            for name in ("temp_bytes", "peak_bytes")
        },
        **{name: _total([one[name] for one in found]) for name in _SUMMED},
        "collectives": _added([one["collectives"] for one in found]),
        "programs": found,
    }
    parts = (kind, chosen.case, chosen.method, chosen.program, chosen.batch_per_chip)
    name = "-".join(map(str, (*parts, *filter(None, [chosen.note]))))
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _added(found: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, collections.Counter[str]] = {}
    for kinds in found:
        for kind, numbers in kinds.items():
            total.setdefault(kind, collections.Counter()).update(numbers)
    return {kind: dict(numbers) for kind, numbers in total.items()}


if __name__ == "__main__":
    main()
