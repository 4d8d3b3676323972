"""Measures training throughput: ours, a PyTorch baseline and other libraries.

    python -m benchmarks.throughput --pair=resnet32x4,resnet8x4 --method=kd,lakd
        --batch=64,1024 --dtype=float32,bfloat16 --peer=torch,torchdistill
    python -m benchmarks.throughput --pair=resnet20,resnet8 --method=kd --peer=keras
        --epochs=5 --images=DIR --teacher=FILE
    python -m benchmarks.throughput --table

All train the same pair, including the teacher's pass, on the first local device, in
turn. `--peer` names what is compared with ours: `torch`, our own PyTorch step
(benchmarks/torch_step.py), eager and compiled, or only one of `torch-eager`,
`torch-compile`, `torch-cudagraphs`; and public libraries with loops of their own
(benchmarks/peers.py, keras_step.py): `keras` (keras.distillation on JAX),
`torchdistill`, `mdistiller` (`--mdistiller=DIR` is a checkout).

Images are random ones of 100 classes, and all run in one process. With `--epochs` they
are those of an image folder, every subject has a process of its own, and memory and
accuracy are measured, too (benchmarks/same_run.py).

Results are kept in one file per (device, pair, batch, dtype) under --results; a method
is not measured again if its file has all that is requested. Sizes left at 0 are: one
step per round on CPUs and 50, in one dispatch, elsewhere (20 with --epochs); matrices
of 2048 on CPUs and 8192 elsewhere, arrays of 256 MiB and 1 GiB, for the ceilings.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import (
    ceilings,
    flag_types,
    ours,
    same_run,
    subjects,
    throughput_table,
    timing,
)
from lakd_jax import version
from lakd_jax.runtime import backend
from lakd_jax.store import workdir

RESULTS = Path(__file__).parent / "results" / "throughput"
METHODS = ("none", "kd", "lakd")  # those that the baseline has, too
DTYPES = ("float32", "bfloat16")
_PACKAGES = ("jax", "jaxlib", "flax", "keras", "torch", "torchdistill")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; lists are split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pair", default="resnet56,resnet20", help="TEACHER,STUDENT")
    add("--method", default="kd,lakd", type=_list, help=f"of {', '.join(METHODS)}")
    add("--batch", default="64", type=_list)
    add("--dtype", default="float32", type=_list, help="float32, bfloat16 or both")
    add("--peer", default="", type=_list, help=f"of {', '.join(subjects.PEERS)}")
    add("--mdistiller", default="", help="folder of its checkout")
    add("--epochs", default=0, type=int, help="train that long, a process each")
    add("--images", default="", help="with --epochs: folder of train/ and test/")
    add("--per_class", default=0, type=int, help="with --epochs: the first; 0: all")
    add("--plain", action="store_true", help="with --epochs: no crops, no mirroring")
    add("--seed", default=0, type=int, help="with --epochs: weights, order and crops")
    add("--teacher", default="", help="with --epochs: file of the teacher's weights")
    add("--rounds", default=20, type=int, help="timed; each is a step or more of all")
    add("--warm_up", default=3, type=int, help="rounds before")
    add("--steps", default=0, type=int, help="of each in a round")
    add("--matmul_side", default=0, type=int)
    add("--copy_mib", default=0, type=int)
    add("--results", default=RESULTS, type=flag_types.path, help="of the records")
    add("--table", action="store_true", help="only print what is recorded")
    chosen = parser.parse_args(arguments)
    known_values = {"method": METHODS, "dtype": DTYPES, "peer": tuple(subjects.PEERS)}
    for flag, known in known_values.items():
        if unknown := set(getattr(chosen, flag)) - set(known):
            parser.error(f"--{flag}: {', '.join(unknown)}; has {', '.join(known)}")
    needed = {"keras" if peer == "keras" else "torch" for peer in chosen.peer}
    if missing := [p for p in sorted(needed) if not importlib.util.find_spec(p)]:
        parser.error(f"--peer needs this: pip install {' '.join(missing)}")
    if "mdistiller" in chosen.peer and not _is_checkout(chosen.mdistiller):
        parser.error("--peer=mdistiller: --mdistiller=DIR is a checkout of it")
    if bool(chosen.epochs) != bool(chosen.images):
        parser.error("--epochs and --images go together")
    return chosen


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _is_checkout(folder: str) -> bool:
    return bool(folder) and (Path(folder) / "mdistiller" / "engine").is_dir()


def resolve(chosen: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on the device."""
    backend.prepare(cache="")
    cpu = jax.default_backend() == "cpu"
    if not chosen.epochs:
        chosen.steps = chosen.steps or (1 if cpu else 50)
    chosen.matmul_side = chosen.matmul_side or (2048 if cpu else 8192)
    chosen.copy_mib = chosen.copy_mib or (256 if cpu else 1024)
    return chosen


def record_path(chosen: argparse.Namespace, batch: str, dtype: str) -> Path:
    """Returns the file of this measurement, named after what is measured."""
    kind = re.sub(r"[^a-z0-9]+", "-", jax.local_devices()[0].device_kind.lower())
    pair = chosen.pair.replace(",", "-")
    trained = f"-{chosen.epochs}-epochs" if chosen.epochs else ""
    trained += f"-{chosen.per_class}-per-class" if chosen.per_class else ""
    trained += f"-seed{chosen.seed}" if chosen.seed else ""
    trained += "-plain" if chosen.plain else ""
    return chosen.results / f"{kind}-{pair}-b{batch}-{dtype}{trained}.json"


def measure(
    chosen: argparse.Namespace, method: str, batch: int, dtype: str
) -> dict[str, Any]:
    """Builds all subjects, times them in turn, and returns the figures.

    If torch.compile fails (e.g. without a C++ compiler), its subject is left out and
    recorded under "failed" with the error.
    """
    teacher, student = chosen.pair.split(",")
    load = os.getloadavg()
    made = ours.setup(ours.configure(teacher, student, method, batch, dtype))
    several = 1 if jax.default_backend() == "cpu" else chosen.steps
    work = made.work(made.rows(64, 1), anew=False)
    runs: list[timing.Subject] = [ours.Ours(made, several, made.rows(8 * several, 1))]
    failed = {}
    for name in subjects.names(chosen.peer, method)[1:]:
        try:
            runs.append(subjects.make(name, work, chosen.mdistiller))
        except Exception as error:  # whatever a compiler may raise
            if name not in subjects.COMPILED:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{name} left out: {failed[name]}", flush=True)
    times = timing.interleaved(
        runs, rounds=chosen.rounds, steps=chosen.steps, warm_up=chosen.warm_up
    )
    peaks = {s.name: s.peak_bytes() for s in runs}  # before the ceilings' arrays
    best = ceilings.measure(dtype, chosen.matmul_side, chosen.copy_mib)
    return {
        **environment(chosen, method, batch, dtype),
        "load_before": load[0],
        "ceilings": best,
        "failed": failed,
        "ratios": timing.ratios(times, "ours"),
        "subjects": {
            s.name: _summary(s.facts, times[s.name], batch, best, peaks[s.name])
            for s in runs
        },
    }


def _summary(
    facts: dict[str, Any],
    times: list[float],
    batch: int,
    best: dict[str, float],
    peak: int | None,
) -> dict[str, Any]:
    seconds = timing.spread(times)
    figures = {
        "step_s": seconds,
        "images_per_s": batch / seconds["median"],
        # Of one measurement only if it was the process's first: none can reset it.
        "process_peak_bytes": peak,
    }
    if "flops" in facts:
        figures["reached"] = ceilings.roofline(facts, best, seconds["median"])
    return facts | figures


def environment(
    chosen: argparse.Namespace, method: str, batch: int, dtype: str
) -> dict[str, Any]:
    """Returns device, versions and command, without paths of this machine."""
    command = {
        "pair": chosen.pair,
        "method": method,
        "batch": batch,
        "dtype": dtype,
        "peer": ",".join(chosen.peer),
        "mdistiller": "CHECKOUT" if chosen.mdistiller else "",
        "rounds": chosen.rounds,
        "warm_up": chosen.warm_up,
        "steps": chosen.steps,
        "matmul_side": chosen.matmul_side,
        "copy_mib": chosen.copy_mib,
    }
    flags = [f"--{flag}={value}" for flag, value in command.items() if value != ""]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.throughput", *flags]),
        "rounds": chosen.rounds,
        "steps_per_round": chosen.steps,
    }


def machine() -> dict[str, Any]:
    """Returns cores, processor and versions."""
    return {
        "threads": subjects.threads(),
        "host_cpu": _cpu_name(),
        "versions": _versions(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lakd_jax": version.VERSION}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def update(chosen: argparse.Namespace, method: str, batch: str, dtype: str) -> None:
    """Measures what the record lacks and adds it."""
    path = record_path(chosen, batch, dtype)
    record = workdir.read_json(path) if path.exists() else {"methods": {}}
    kept = record["methods"].get(method, {"subjects": {}, "failed": {}})
    if (
        set(subjects.names(chosen.peer, method))
        <= kept["subjects"].keys() | kept["failed"].keys()
    ):
        print(f"{path.name}: has {method}", flush=True)
        return
    print(f"{path.name}: {method}", flush=True)
    began = time.perf_counter()
    how = same_run.measure if chosen.epochs else measure
    record["methods"][method] = machine() | how(chosen, method, int(batch), dtype)
    record |= {
        "device": jax.local_devices()[0].device_kind,
        "pair": chosen.pair.split(","),
        "batch": int(batch),
        "dtype": dtype,
    }
    if chosen.epochs:
        record["epochs"] = chosen.epochs
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_json(path, record)
    print(throughput_table.render([throughput_table.only(record, method)]))
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line requests, or prints what is recorded."""
    chosen = parse(arguments)
    if chosen.table:
        records = map(workdir.read_json, sorted(chosen.results.glob("*.json")))
        print(throughput_table.render(list(records)))
        return
    # Read when JAX first lists its devices: PyTorch needs its share of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen = resolve(chosen)
    try:
        for batch in chosen.batch:
            for dtype in chosen.dtype:
                for method in chosen.method:
                    update(chosen, method, batch, dtype)
    except timing.Unusable as error:
        raise SystemExit(f"{error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; what was measured is recorded") from None


if __name__ == "__main__":
    main()
