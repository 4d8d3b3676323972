"""What the files of a run need in a bucket, which is no disk.

An object is put whole or not at all, so there is no temporary file and no rename;
folders exist once they hold something; nothing can be appended or locked, but an object
can be written on condition that nobody else has written it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from lakd_jax import errors, paths

COMMITTED = "commit_success.txt"  # written last into a folder by Orbax
_SECONDS = 30.0  # until a request is given up, or the first one of a run


@dataclasses.dataclass(frozen=True)
class Stored:
    """The content of an object, and the number that its next content will not have."""

    content: bytes
    generation: int


class Object:
    """An object that several processes write, on condition of its generation."""

    def __init__(self, path: pathlib.Path):
        """`path` is in a bucket."""
        self._bucket, self._name = _located(path)

    def read(self) -> Stored | None:
        """Returns what is stored; None if there is nothing."""
        from google.api_core import exceptions

        while True:
            blob = self._bucket.get_blob(self._name, timeout=_SECONDS)
            if blob is None:
                return None
            with contextlib.suppress(
                exceptions.NotFound, exceptions.PreconditionFailed
            ):
                content = blob.download_as_bytes(
                    if_generation_match=blob.generation, timeout=_SECONDS
                )
                return Stored(content, blob.generation)

    def write(self, content: bytes, generation: int) -> int | None:
        """Replaces what has this generation; 0 stands for an absent object.

        Returns the new generation; None if another process has written meanwhile.
        """
        from google.api_core import exceptions

        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(
                content, if_generation_match=generation, timeout=_SECONDS
            )
        except exceptions.PreconditionFailed:
            return None
        return blob.generation

    def delete(self, generation: int) -> None:
        """Deletes what has this generation, if it still exists."""
        from google.api_core import exceptions

        blob = self._bucket.blob(self._name)
        with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
            blob.delete(if_generation_match=generation, timeout=_SECONDS)


def require_writable(path: pathlib.Path) -> None:
    """Writes and deletes a small object in a folder of a bucket.

    Raises:
      errors.WorkdirError: the bucket does not exist, cannot be reached, or must not be
        written.
    """
    from google.cloud.storage import retry

    try:
        bucket, name = _located(path / ".write_test")
        blob, patience = bucket.blob(name), retry.DEFAULT_RETRY.with_timeout(_SECONDS)
        blob.upload_from_string(b"", timeout=_SECONDS, retry=patience)
        blob.delete(timeout=_SECONDS, retry=patience)
    except Exception as error:  # of any layer between here and the bucket
        raise errors.WorkdirError(
            f"{path}: cannot be written: {_reason(error)}"
        ) from error


def make_folder(path: pathlib.Path) -> None:
    """Creates a folder and those above it; a bucket needs none."""
    if not paths.is_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def write(path: pathlib.Path, data: bytes | memoryview) -> None:
    """Writes an object of a bucket, which appears once it is complete."""
    with reported(path):
        path.write_bytes(data)


def size(path: pathlib.Path) -> int:
    """Returns the size of a file or an object in bytes."""
    found: Any = path.stat()
    return found.length if paths.is_bucket(path) else found.st_size


def committed(folder: pathlib.Path) -> list[int]:
    """Returns the numbers of subfolders that Orbax has completed, ascending.

    A save in progress has its final name already.

    Raises:
      OSError: the bucket cannot be read.
    """
    # Not is_dir(), which is False if the bucket does not answer.
    with reported(folder):
        found = list(folder.iterdir()) if folder.exists() else []
        numbered = [p for p in found if p.name.isdecimal()]
        return sorted(int(p.name) for p in numbered if (p / COMMITTED).exists())


@contextlib.contextmanager
def local_copy(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a file on this machine with the content of `path`: itself if it is one."""
    if not paths.is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / path.name
        with reported(path):
            copy.write_bytes(path.read_bytes())
        yield copy


def move_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a folder of a bucket, object by object.

    If the process dies meanwhile, `source` has either everything, or no COMMITTED, so
    that it is no checkpoint any more.
    """
    old, new = (f"{_located(folder)[1]}/" for folder in (source, target))
    with reported(source):
        inside, _ = _located(source)
        blobs = list(inside.list_blobs(prefix=old))
        for blob in blobs:
            inside.copy_blob(blob, inside, new + blob.name.removeprefix(old))
        blobs.sort(key=lambda blob: not blob.name.endswith(f"/{COMMITTED}"))
        for blob in blobs:
            blob.delete()


@contextlib.contextmanager
def reported(path: pathlib.Path) -> Iterator[None]:
    """Turns any failure to reach a bucket into an OSError, as a failing disk raises."""
    try:
        yield
    except (OSError, errors.LakdError):
        raise
    except Exception as error:
        if not paths.is_bucket(path):
            raise
        raise OSError(f"{path}: {_reason(error)}") from error


def _located(path: pathlib.Path) -> tuple[Any, str]:
    """Returns the bucket of a path, and the name of the object in it."""
    bucket, _, name = str(path).removeprefix("gs://").partition("/")
    return _client().bucket(bucket), name


@functools.cache
def _client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _reason(error: Exception) -> str:
    """Returns one line: what is wrong, and what can be done."""
    from google.api_core import exceptions
    from google.auth import exceptions as of_login

    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, exceptions.NotFound):
        return "there is no such bucket; create it first"
    if isinstance(error, exceptions.Forbidden | exceptions.Unauthorized):
        return f"no right to create and delete objects there ({first:.120})"
    if isinstance(error, of_login.DefaultCredentialsError):
        return "no credentials: run `gcloud auth application-default login`"
    return f"{type(error).__name__}: {first:.120}"
