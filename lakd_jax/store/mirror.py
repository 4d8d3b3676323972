"""A folder in which files of a run are appended to, which a bucket does not allow."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterable

from lakd_jax import paths
from lakd_jax.store import bucket, locks


class Mirror:
    """The directory of a run, or, for one in a bucket, a folder on this machine.

    `put` then writes the files that have changed to the bucket, each of them whole.

    Attributes:
      folder: where to write.
    """

    def __init__(self, directory: pathlib.Path, needed: Iterable[str]):
        """Makes the folder; it begins with those files of `needed` that exist."""
        self.folder = self._directory = directory
        self._scratch, self._put = None, {}
        if not paths.is_bucket(directory):
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="lakd_jax-")
        self.folder = pathlib.Path(self._scratch.name)
        with bucket.reported(directory):
            for name in needed:
                if (directory / name).exists():
                    file = self.folder / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes((directory / name).read_bytes())
                    self._put[file] = _version(file)

    def put(self) -> None:
        """Writes the files that have changed; does nothing on a disk.

        Raises:
          errors.LakdError: another process has taken over the run.
          OSError: the bucket cannot be written.
        """
        if self._scratch is None:
            return
        locks.require_held(self._directory)
        for file in sorted(self.folder.rglob("*")):
            if file.is_symlink() or not file.is_file():
                continue
            version = _version(file)
            if self._put.get(file) != version:
                target = self._directory / file.relative_to(self.folder)
                bucket.write(target, file.read_bytes())
                self._put[file] = version

    def close(self) -> None:
        """Deletes the folder on this machine."""
        if self._scratch is not None:
            self._scratch.cleanup()


def _version(file: pathlib.Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
