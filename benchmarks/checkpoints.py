"""Measures checkpoints: checksums, how long the loop waits, size on disk.

`python -m benchmarks.checkpoints [--mib=200] [--saves=5]` saves a state of random
float32 leaves into a temporary folder and prints medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from lakd_jax.store import checkpoint, manifest

_LEAVES = 160  # about as many as ResNet-50 has


def state(mib: float) -> dict[str, jax.Array]:
    """Returns random leaves, `mib` MiB in total."""
    rng = np.random.default_rng(0)
    size = int(mib * 2**20 / 4 / _LEAVES)
    draw = rng.standard_normal
    return {f"w{i}": jax.device_put(draw(size, np.float32)) for i in range(_LEAVES)}


def measure(mib: float, saves: int) -> dict[str, float]:
    """Returns medians over `saves` saves and one restore, in seconds and MiB."""
    held, seconds = state(mib), {"checksums": [], "start": [], "whole save": []}
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Checkpointer(folder, keep=1) as saver:
            for step in range(1, saves + 1):
                begin = time.perf_counter()
                manifest.describe(step, manifest.host_leaves(held), {})
                seconds["checksums"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                saver.save(step, held, extra={})
                seconds["start"].append(time.perf_counter() - begin)
                saver.wait()
                seconds["whole save"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            saver.restore(held)
            restored = time.perf_counter() - begin
        files = [f for f in Path(folder).rglob("*") if f.is_file()]
        disk = sum(f.stat().st_size for f in files) / 2**20
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {"restore": restored, "MiB on disk": disk}


def main() -> None:
    """Prints one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=200.0)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.mib:g} MiB in {_LEAVES} leaves, {jax.devices()[0].device_kind}")
    for name, value in measure(args.mib, args.saves).items():
        print(f"{name:12} {value:.3f}")


if __name__ == "__main__":
    main()
