"""The Python interface: trains like the command line, and loads finished runs."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lakd_jax import config as config_lib
from lakd_jax import evaluation, explain, export, paths
from lakd_jax.config import command_line
from lakd_jax.data import preparation as preparation_lib
from lakd_jax.models import chain
from lakd_jax.report import metrics
from lakd_jax.runs import command
from lakd_jax.runtime import hosts
from lakd_jax.store import workdir
from lakd_jax.training import predict
from lakd_jax.training import spec as spec_lib


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
      predictor: the student with its variables after the last epoch, and how images
        come to it: `model`, `variables`, `preparation`, `pixels`.
    """

    directory: Path
    settings: dict[str, Any]
    result: dict[str, Any]
    history: list[dict[str, Any]]
    predictor: predict.Predictor

    @property
    def model(self) -> chain.Chain:
        """Returns the student."""
        return self.predictor.model

    @property
    def variables(self) -> Any:
        """Returns the student's variables after the last epoch."""
        return self.predictor.variables

    @property
    def pixels(self) -> spec_lib.Pixels:
        """Returns the conversion of prepared uint8 images to the student's input."""
        return self.predictor.pixels

    @property
    def accuracy(self) -> float:
        """Returns the test accuracy after the last epoch, in [0, 1]."""
        return self.result["test_last"]["accuracy"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Returns the class names, in logit order."""
        return tuple(self.result["class_names"])

    @property
    def preparation(self) -> preparation_lib.Preparation:
        """Returns what is done to images of any size before `pixels`."""
        return self.predictor.preparation

    def __call__(
        self, images: np.ndarray | Iterable[preparation_lib.Picture]
    ) -> np.ndarray:
        """Computes float32 logits (N, classes), prepared as the run's test images were.

        Args:
          images: uint8 RGB arrays (N, H, W, 3) of any size, or paths, PIL images and
            arrays (H, W, 3), which may differ in size.

        Raises:
          errors.DataError: a file cannot be decoded.
          TypeError, ValueError: one of them is no image.
        """
        return self.predictor(images)

    def predict(
        self,
        images: np.ndarray
        | preparation_lib.Picture
        | Iterable[preparation_lib.Picture],
    ) -> list[str]:
        """Returns the predicted class names of images.

        Args:
          images: as for calling the run, or a single path or PIL image.
        """
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        return [self.classes[index] for index in self(images).argmax(-1)]

    def evaluate(self, data: str = "", images: str | Path = "") -> dict[str, Any]:
        """Evaluates the student; writes `evaluation/` in the run's directory.

        Args:
          data: a data source in place of the run's own, such as "folder:PATH", whose
            test split is taken.
          images: a folder of images instead: of class folders, or without labels.

        Returns:
          The content of evaluation.json; see `lakd_jax.evaluation.run`.
        """
        changes = {"data.source": data} if data else {}
        with hosts.guard() as guard:
            return evaluation.run(
                self.directory, changes=changes, images=images, guard=guard
            )

    def report(self, points: str = "", masks: str | Path = "") -> Path:
        """Writes `report.html`, one page about what was learnt, and returns its path.

        Custom networks and methods must be registered first. For the arguments see
        `lakd_jax.explain.run`.

        Raises:
          errors.LakdError: the run's data or teacher are no longer available.
        """
        with hosts.guard() as guard:
            return explain.run(self.directory, points=points, masks=masks, guard=guard)

    def export(self, to: str, which: str = "last") -> Path:
        """Exports the student; see `lakd_jax.export.run`."""
        return export.run(self.directory, to, which=which)


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
        directory = paths.place(directory, "--workdir")
        return [load(directory / f"seed{seed}") for seed in config.seeds]
    return load(directory)


def load(directory: str | Path) -> Run:
    """Loads a finished run, or one of its baselines.

    Custom networks must be registered first.

    Raises:
      errors.ConfigError: `directory` is neither a local path nor in a bucket.
      errors.ExportError: there is no finished run, or it is damaged.
    """
    directory = paths.place(directory, "--workdir")
    student, _, settings = export.student(directory)
    return Run(
        directory=directory,
        settings=settings,
        result=workdir.read_json(directory / workdir.RESULT),
        history=metrics.read(directory),
        predictor=export.predictor(student),
    )
