"""Trains ours and peers on real images, a process each, in turn.

The part of `benchmarks.throughput` behind --epochs. All have the same images in the
same order, the same first weights and the same teacher, and crop and mirror by their
own random numbers (with --plain not at all: all see the same pixels). The training
itself is what is timed: each makes a few steps, then the next one does, until all have
finished their epochs; then all are tested. The learning rate is constant, and an
epoch's incomplete batch is left out.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours, subjects, timing
from benchmarks import work as work_lib
from lakd_jax import data

# Those of the published CIFAR-10 weights, for teacher and student.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MINIVAL = 0.1  # left out, as in a run
_TURN = 20  # steps, so that what a library does before and after a few hardly matters


class Remote:
    """A subject in a process of its own; a `timing.Subject` as far as that needs."""

    def __init__(self, name: str, work_file: Path, checkout: str):
        """Starts it and waits for its first step.

        Raises:
          timing.Unusable: it could not make one; the message has the child's reason.
        """
        self.name = name
        command = [sys.executable, "-m", "benchmarks.child", name, str(work_file)]
        self._process = subprocess.Popen(
            [*command, checkout],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        found = self._read()
        if "failed" in found:
            self.close()
            raise timing.Unusable(f"{name}: {found['failed']}")
        self.facts: dict[str, Any] = found["facts"]
        self.cpu_s: list[float] = []

    def run(self, steps: int) -> None:
        """See `timing.Subject`; `cpu_s` gets the process's own time per step."""
        self.cpu_s.append(self._ask(run=steps)["cpu_s"] / steps)

    def peak_bytes(self) -> int:
        """Returns the most memory that was resident since the process began."""
        return self._ask(peak=True)["bytes"]

    def right(self) -> int:
        """Returns the number of correct answers on the test images."""
        return self._ask(test=True)["right"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise timing.Unusable(f"{self.name}: its process ended; see above")
        return json.loads(line)


def prepare(
    chosen: argparse.Namespace, method: str, batch: int, dtype: str
) -> work_lib.Work:
    """Reads the images and returns what all train and are tested on."""
    found = data.load(f"folder:{chosen.images}", minival=_MINIVAL)
    train = found.train
    if chosen.per_class:
        train = train.take(_first(train.labels, chosen.per_class))
    fields = {"data.mean": _MEAN, "data.std": _STD, "epochs": chosen.epochs}
    fields["seed"] = chosen.seed
    if chosen.plain:
        fields |= {"data.pad": 0, "data.flip": False}
    # Relative paths start elsewhere in a run.
    fields["teacher.init"] = os.path.abspath(chosen.teacher) if chosen.teacher else ""
    config = ours.configure(*chosen.pair.split(","), method, batch, dtype, fields)
    made = ours.setup(config, train)
    order = _order(len(train), batch, chosen.epochs, chosen.seed)
    return dataclasses.replace(
        made.work(order, anew=True),
        fields=fields,
        test_images=found.test.images,
        test_labels=found.test.labels,
    )


def _first(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the first `count` examples of each class."""
    places = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(places))


def _order(examples: int, batch: int, epochs: int, seed: int) -> np.ndarray:
    """Returns positions (S, B), every epoch in another order."""
    steps = examples // batch
    shuffled = [
        np.random.default_rng((epoch, seed)).permutation(examples)[: steps * batch]
        for epoch in range(epochs)
    ]
    return np.concatenate(shuffled).reshape(-1, batch).astype(np.int32)


def measure(
    chosen: argparse.Namespace, method: str, batch: int, dtype: str
) -> dict[str, Any]:
    """Trains all in turn; returns times, memory and accuracy by subject."""
    work = prepare(chosen, method, batch, dtype)
    runs, failed = [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work"
        work.save(path)
        try:
            for name in subjects.names(chosen.peer, method):
                try:
                    runs.append(Remote(name, path, chosen.mdistiller))
                except timing.Unusable as error:
                    if name not in subjects.COMPILED:
                        raise
                    failed[name] = str(error)
                print(f"{name}: {failed.get(name, 'first step made')}", flush=True)
            found = _race(runs, chosen, work)
        finally:
            for run in runs:
                run.close()
    return {
        "command": _command(chosen, method, batch, dtype),
        "train_images": len(work.labels),
        "test_images": len(work.test_labels),
        "failed": failed,
        **found,
    }


def _race(
    runs: list[Remote], chosen: argparse.Namespace, work: work_lib.Work
) -> dict[str, Any]:
    steps = chosen.steps or _TURN
    turns, rest = divmod(len(work.order) - 1, steps)  # the first step is made
    timed = turns - chosen.warm_up
    if timed < 1:
        raise timing.Unusable(f"{turns} turns of --steps={steps}: give more --epochs")
    warm_up = chosen.warm_up
    times = timing.interleaved(runs, rounds=timed, steps=steps, warm_up=warm_up)
    both = {"step_s": times}
    both["cpu_s"] = {run.name: run.cpu_s[warm_up:] for run in runs}
    peaks = {run.name: run.peak_bytes() for run in runs}
    for run in runs:
        if rest:
            run.run(rest)
    return {
        "turns": timed,
        "steps_per_turn": steps,
        "subjects": {
            run.name: {
                "first_step_s": run.facts["first_step_s"],
                "peak_bytes": peaks[run.name],
                "right": run.right(),
                **{
                    kind: timing.spread(found[run.name]) for kind, found in both.items()
                },
            }
            for run in runs
        },
        "ratios": {
            kind: timing.ratios(found, subjects.OURS) for kind, found in both.items()
        },
    }


def _command(chosen: argparse.Namespace, method: str, batch: int, dtype: str) -> str:
    """Returns the command, with names in place of this machine's folders."""
    flags = {
        "pair": chosen.pair,
        "method": method,
        "batch": batch,
        "dtype": dtype,
        "peer": ",".join(chosen.peer),
        "epochs": chosen.epochs,
        "per_class": chosen.per_class or "",
        "seed": chosen.seed,
        "images": "IMAGES",
        "teacher": f"WEIGHTS/{Path(chosen.teacher).name}" if chosen.teacher else "",
        "mdistiller": "CHECKOUT" if chosen.mdistiller else "",
        "steps": chosen.steps or _TURN,
        "warm_up": chosen.warm_up,
    }
    words = [f"--{flag}={value}" for flag, value in flags.items() if value != ""]
    words += ["--plain"] if chosen.plain else []
    return shlex.join(["python", "-m", "benchmarks.throughput", *words])
