"""Trackers record the metrics of a run somewhere; this is what all have in common.

A run writes its metrics to metrics.jsonl and hands the same records to the trackers of
`config.trackers`. A tracker is a class in one file, with a table `TRACKERS` from its
name if it is built in.
"""

import dataclasses
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class About:
    """What a tracker is told of the run.

    Attributes:
      name: the command's directory and what is below it, such as "kd/seed0".
      group: the command's directory, the same for its seeds, baselines and teacher.
      job: the method, or "teacher" of a teacher that is trained first.
      config: the fields by name, `{"optim.lr": 0.1, ...}`, without folders.
    """

    name: str = ""
    group: str = ""
    job: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Tracker:
    """Receives the metrics of one run; only in the first process.

    An exception of any method is reported once and ends this tracker, not the run.

    Attributes:
      package: the package to install; "" for none.
      replay: whether the records up to the restored step are written again when a run
        resumes: an uploader that was killed may have lost the last of them. A tracker
        that starts anew at every `open` then has all records, each once.
    """

    package: ClassVar[str] = ""
    replay: ClassVar[bool] = True

    def open(
        self, directory: pathlib.Path, about: About, resume_step: int | None
    ) -> None:
        """Starts, or goes on.

        Args:
          directory: of the run; exists. For a run in a bucket, a folder on this
            machine, whose files are put there with each checkpoint.
          about: describes the run.
          resume_step: step of the restored checkpoint; None from scratch. Records of
            later steps will be written again, with the same values.
        """
        raise NotImplementedError

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Records scalars.

        Args:
          step: optimiser steps completed; may come twice, with another kind.
          kind: "train" or "eval".
          values: by name; may be NaN or infinite.
        """
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        """Ends the recording; `failed`: the run was stopped or ended with an error."""


def recalled(directory: pathlib.Path, name: str) -> str:
    """Returns the text that `remember` kept in a run's directory; "" if there is none.

    Args:
      directory: of the run.
      name: of the tracker.
    """
    from lakd_jax.store import workdir  # not above: it imports JAX

    try:
        return str(workdir.read_json(directory / file_of(name))["id"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def remember(directory: pathlib.Path, name: str, identity: str) -> None:
    """Keeps what `recalled` returns, in DIRECTORY/trackers/NAME.json."""
    from lakd_jax.store import workdir

    file = directory / file_of(name)
    file.parent.mkdir(exist_ok=True)
    workdir.write_json(file, {"id": identity})


def new_identity() -> str:
    """Returns an id that no other run has."""
    return uuid.uuid4().hex


def file_of(name: str) -> str:
    """Returns where `remember` keeps its text, in a run's directory."""
    return f"trackers/{name}.json"
