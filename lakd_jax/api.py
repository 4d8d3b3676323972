"""The Python interface: trains like the command line, and loads finished runs."""

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
from lakd_jax.training import spec as spec_lib

_BATCH = 256  # images per call, so that memory does not grow with their number


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its student, ready to use, and its record.

    Attributes:
      directory: the run's directory, which also has its pictures. Baselines are in
        subdirectories named after their method; `load` accepts these, too.
      settings: the config it was trained with, as plain dictionaries.
      result: the contents of `result.json`; `result["test_last"]["accuracy"]` is the
        accuracy of the last epoch on the test split, in [0, 1].
      history: the metrics, oldest first: dictionaries with `step` and `kind`, "train"
        or "eval".
      model: the student.
      variables: the student's variables after the last epoch.
      pixels: converts uint8 images (N, H, W, 3) of any size to the student's input.
    """

    directory: Path
    settings: dict[str, Any]
    result: dict[str, Any]
    history: list[dict[str, Any]]
    model: chain.Chain
    variables: Any
    pixels: spec_lib.Pixels

    @property
    def accuracy(self) -> float:
        """Returns the test accuracy after the last epoch, in [0, 1]."""
        return self.result["test_last"]["accuracy"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Returns the class names, in logit order."""
        return tuple(self.result["class_names"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Computes float32 logits (N, classes) of uint8 RGB images (N, H, W, 3).

        Raises:
          ValueError: the images have another type or shape.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[3:] != (3,):
            raise ValueError(
                "images must be uint8 of shape (N, H, W, 3), are "
                f"{images.dtype} of {images.shape}; pass a single one as images[None]"
            )
        starts = range(0, max(len(images), 1), _BATCH)
        parts = [self._logits(self.variables, images[s : s + _BATCH]) for s in starts]
        return np.concatenate([np.asarray(part) for part in parts])

    def predict(self, images: np.ndarray) -> list[str]:
        """Returns the predicted class names of uint8 RGB images (N, H, W, 3)."""
        return [self.classes[index] for index in self(images).argmax(-1)]

    def report(self) -> Path:
        """Writes `report.html`, one page about what was learnt, and returns its path.

        Custom networks and methods must be registered first.

        Raises:
          errors.LakdError: the run's data or teacher are no longer available.
        """
        with hosts.guard() as guard:
            return explain.run(self.directory, guard=guard)

    def export(self, to: str) -> Path:
        """Exports the student; see `lakd_jax.export.run`."""
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
    """Trains as `config` describes, resumes the run, or loads it if it is finished.

    Args:
      config: `lakd_jax.config.default()` with fields set, or the path of a config
        file, optionally followed by ":ARG".
      directory: the run's directory, `--workdir` of the command line.

    Returns:
      The run; with `config.seeds`, one run per seed.

    Raises:
      errors.LakdError: the errors the command line prints; see `lakd_jax.errors`.
      interrupt.Interrupted: Ctrl-C, or a notebook's stop button. The last step is
        saved; the same call resumes from there.
      KeyboardInterrupt: the same while a program was compiled or data were loaded; the
        same call resumes from the last checkpoint.
    """
    if isinstance(config, str | Path):
        config, _, _ = command_line.parse([f"--config={config}"])
    command.run(config, directory)
    if config.seeds:
        directory = paths.local(directory, "--workdir")
        return [load(directory / f"seed{seed}") for seed in config.seeds]
    return load(directory)


def load(directory: str | Path) -> Run:
    """Loads a finished run, or one of its baselines.

    Custom networks must be registered first.

    Raises:
      errors.ConfigError: `directory` is not a local path.
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
