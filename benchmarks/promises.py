"""Measures the times in docs/reliability.md, which no test asserts.

`python -m benchmarks.promises [--repeats=3]` runs `python main.py` in separate
processes, on the digits if they train, and prints medians, with extremes in brackets.
"""

import argparse
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from lakd_jax.data import order

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = f"--config={ROOT / 'configs' / 'digits_lakd.py'}"
FAULTS = (
    DIGITS,
    "--config.optim.lrr=0.1",
    "--config.epochs=ten",
    "--config.student.name=resnet21",
    "--config.batch_size=0",
)
# Name, training images and batch size of a data set.
ORDERS = (("CIFAR", 50_000, 64), ("ImageNet", 1_281_167, 256))
FAR = 10**6 + 1  # a step
_INTO_COMPILATION = 1.0  # seconds from the line before it
_PATIENCE = 300  # seconds that a process may take, many times what it needs


def ended(*args: str, code: int) -> float:
    """Returns the seconds that `python main.py ARGS` takes to end with `code`."""
    command = [sys.executable, str(ROOT / "main.py"), *args]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    seconds = time.perf_counter() - began
    _require(done.returncode == code, done.stdout + done.stderr)
    return seconds


def drawn(examples: int, batch_size: int) -> float:
    """Returns the seconds to compute a far step's batch without a cached epoch."""
    order._permutation.cache_clear()
    began = time.perf_counter()
    order.batch_indices(123, FAR, examples, batch_size, False)
    return time.perf_counter() - began


def stopped(after: str, wait: float, code: int) -> float:
    """Returns the seconds from SIGTERM to the end of a training on the digits.

    The signal is sent `wait` seconds after the first line that begins with `after`; the
    process must end with `code`.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                *(sys.executable, "-u", str(ROOT / "main.py"), DIGITS),
                *("--config.method=none", "--config.baselines=()"),
                f"--config.compile_cache={folder}/cache",
                f"--workdir={folder}/run",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(after):
                break
        time.sleep(wait)
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=_PATIENCE)
        seconds = time.perf_counter() - began
    _require(process.returncode == code, "".join(lines) + rest)
    _require("step " in after or "step " not in rest, f"compiled already:\n{rest}")
    return seconds


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(text)


def rows() -> dict[str, Callable[[], float]]:
    """Returns what is measured: name in the table -> function that returns seconds."""
    far = f"batch of step {FAR:,}"
    orders = {
        f"{far}, {name}'s size": lambda examples=examples, batch=batch: drawn(
            examples, batch
        )
        for name, examples, batch in ORDERS
    }
    return {
        "--help": lambda: ended("--help", code=0),
        "four faults of the configuration": lambda: ended(*FAULTS, code=2),
        **orders,
        "SIGTERM while compiling to exit": lambda: stopped(
            "resnet8, ", _INTO_COMPILATION, -signal.SIGTERM
        ),
        "SIGTERM between steps to exit": lambda: stopped("step ", 0, 0),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| measured | seconds |\n| --- | --- |")
    for name, measure in rows().items():
        found = [measure() for _ in range(args.repeats)]
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
