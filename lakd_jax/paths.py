"""Paths given by the user, with `~` for the home folder, and buckets (gs://).

A place in a bucket is etils' `epath.Path`, which has the methods of `pathlib.Path` and
is treated as one; all others are `pathlib.Path`.
"""

import importlib.util
import os
import pathlib
import re
from typing import Any

from lakd_jax import errors

_BUCKET = "gs://"
# "gs:/b" is refused as well, since `Path` makes it of "gs://b". "c:/x" is not a URL.
_URL = re.compile(r"://|^[A-Za-z][A-Za-z0-9+.-]+:/")


def is_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(_BUCKET)


def fault(path: str | os.PathLike) -> str:
    """Describes what is wrong with a local path, existing or not; "" if it is valid."""
    text = os.fspath(path)
    if _URL.search(text):
        return (
            f"must be a local path, is {text!r}: use a local folder, or mount the "
            "bucket (e.g. with gcsfuse)"
        )
    if os.path.expanduser(text).startswith("~"):
        user = text.partition("/")[0]
        return f"is {text!r}, and {user} has no home folder here: write the full path"
    return ""


def place_fault(path: str | os.PathLike) -> str:
    """Describes what is wrong with a path that may be in a bucket; see `fault`."""
    text = os.fspath(path)
    if not is_bucket(text):
        return fault(text).replace("a local path", "a local path or gs://BUCKET/FOLDER")
    bucket, _, folder = text.removeprefix(_BUCKET).partition("/")
    if not bucket or not folder.strip("/"):
        return f"must be gs://BUCKET/FOLDER, is {text!r}"
    if importlib.util.find_spec("gcsfs") is None:
        return f'is {text!r}, which needs gcsfs: pip install "lakd-jax[gcs]"'
    return ""


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns the path with `~` expanded; used where only local paths are possible.

    Args:
      path: as given by the user.
      name: of the field or flag, for the error message.

    Raises:
      errors.ConfigError: see `fault`.
    """
    if found := fault(path):
        raise errors.ConfigError([f"{name} {found}"])
    return pathlib.Path(os.path.expanduser(path))


def place(
    path: str | os.PathLike, name: str, folder: pathlib.Path = pathlib.Path()
) -> pathlib.Path:
    """Returns the path with `~` expanded, or the place in a bucket.

    Args:
      path: as given by the user.
      name: of the field or flag, for the error message.
      folder: where a relative path starts.

    Raises:
      errors.ConfigError: see `place_fault`.
    """
    if found := place_fault(path):
        raise errors.ConfigError([f"{name} {found}"])
    return of(path) if is_bucket(path) else folder / os.path.expanduser(path)


def of(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path that was checked before, of the type for its place."""
    return _in_bucket(path) if is_bucket(path) else pathlib.Path(path)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """Returns the path from the root; that of a bucket is its own."""
    return path if is_bucket(path) else path.absolute()


def within(folder: pathlib.Path, path: str, name: str) -> str:
    """Returns a user's path, which starts in `folder` if it is relative.

    It is returned as it is if it is empty or in a bucket, or if `folder` is
    `pathlib.Path()`, the current one. For `name` and errors see `local`.
    """
    if not path or folder == pathlib.Path() or is_bucket(path):
        return path
    return str(folder / local(path, name))


def _in_bucket(path: str | os.PathLike) -> Any:
    import fsspec.config
    from etils import epath

    # TensorFlow, if it is installed, would be used with credentials of its own.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Asking for each bucket's kind takes credentials that not everybody has.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # What is listed may be old: other machines write to the bucket, too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(os.fspath(path))
