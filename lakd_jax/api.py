"""From Python: train as the command line does, and use what a run has left."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lakd_jax import config as config_lib
from lakd_jax import explain, export, paths
from lakd_jax.config import command_line
from lakd_jax.models import chain
from lakd_jax.report import metrics
from lakd_jax.runs import command
from lakd_jax.runtime import hosts
from lakd_jax.store import workdir
from lakd_jax.training import spec

_BATCH = 256  # images at once: what is in memory does not grow with their number


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its student, ready to use, and its record.

    Attributes:
      directory: of the run; its pictures are there. Baselines are in subdirectories
        by the name of the method, for `load`.
      settings: the config it was trained with, as plain dictionaries.
      result: what `result.json` holds: `result["test_last"]["accuracy"]` is that of
        the last epoch on the test split, in 0..1.
      history: its metrics, oldest first: dictionaries with `step` and `kind`, "train"
        or "eval".
      model: the student.
      variables: the student's, of the last epoch.
      pixels: uint8 images (N, H, W, 3) of any size -> the student's input.
    """

    directory: Path
    settings: dict[str, Any]
    result: dict[str, Any]
    history: list[dict[str, Any]]
    model: chain.Chain
    variables: Any
    pixels: spec.Pixels

    @property
    def accuracy(self) -> float:
        """On the test split, of the last epoch, in 0..1."""
        return self.result["test_last"]["accuracy"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the logits."""
        return tuple(self.result["class_names"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The student's logits (N, classes) float32 of uint8 RGB images (N, H, W, 3).

        Raises:
          ValueError: images of another type or shape.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[3:] != (3,):
            raise ValueError(
                "images must be uint8 of shape (N, H, W, 3), are "
                f"{images.dtype} of {images.shape}; a single one is images[None]"
            )
        starts = range(0, max(len(images), 1), _BATCH)
        parts = [self._logits(self.variables, images[s : s + _BATCH]) for s in starts]
        return np.concatenate([np.asarray(part) for part in parts])

    def predict(self, images: np.ndarray) -> list[str]:
        """The names of the likeliest classes; as calling it."""
        return [self.classes[index] for index in self(images).argmax(-1)]

    def report(self) -> Path:
        """Writes and gives `report.html`, one page about what was learnt.

        Networks and methods of your own must be registered. It needs the run's data
        and teacher; errors.LakdError where they are gone.
        """
        with hosts.guard() as guard:
            return explain.run(self.directory, guard=guard)

    def export(self, to: str) -> Path:
        """Gives the student out; see `lakd_jax.export.run`."""
        return export.run(self.directory, to)

    @functools.cached_property
    def _logits(self) -> Any:
        def logits(variables: Any, images: jax.Array) -> jax.Array:
            outputs: Any = self.model.apply(variables, self.pixels(images), train=False)
            return outputs.logits

        return jax.jit(logits)


def train(
    config: config_lib.ConfigDict | str | Path, directory: str | Path
) -> Run | Sequence[Run]:
    """Trains what `config` describes, or goes on, or brings back what is finished.

    Args:
      config: `lakd_jax.config.default()` with fields set, or the path of a file in
        `configs/`, to which ":ARG" may be added.
      directory: where the run is kept, `--workdir` of the command line.

    Returns:
      The run; with `config.seeds` one for each.

    Raises:
      errors.LakdError: what the command line would print; see `lakd_jax.errors`.
      interrupt.Interrupted: Ctrl-C, or a notebook's stop button. The last step is
        saved, and the same call goes on from there.
    """
    if isinstance(config, str | Path):
        config, _, _ = command_line.parse([f"--config={config}"])
    command.run(config, directory)
    if config.seeds:
        directory = paths.local(directory, "--workdir")
        return [load(directory / f"seed{seed}") for seed in config.seeds]
    return load(directory)


def load(directory: str | Path) -> Run:
    """A finished run, or one of its baselines.

    A network of your own must be registered first.

    Raises:
      errors.ConfigError: it is no local path.
      errors.ExportError: there is no finished run, or it is damaged.
    """
    directory = paths.local(directory, "--workdir")
    student, _, settings = export.student(directory)
    return Run(
        directory=directory,
        settings=settings,
        result=workdir.read_json(directory / workdir.RESULT),
        history=metrics.read(directory),
        model=student.model,
        variables=jax.device_put(student.variables),
        pixels=export.pixels(student),
    )
