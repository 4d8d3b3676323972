"""Paths given by the user: local, with `~` for the home folder."""

import os
import pathlib
import re

from lakd_jax import errors

# "gs:/b" is refused as well, since `Path` makes it of "gs://b". "c:/x" is not a URL.
_URL = re.compile(r"://|^[A-Za-z][A-Za-z0-9+.-]+:/")


def fault(path: str | os.PathLike) -> str:
    """Describes what is wrong with a path, existing or not; "" for a valid one."""
    text = os.fspath(path)
    if _URL.search(text):
        return (
            f"must be a local path, is {text!r}: buckets and URLs are not supported "
            "yet; use a local folder, or mount the bucket (e.g. with gcsfuse)"
        )
    if os.path.expanduser(text).startswith("~"):
        user = text.partition("/")[0]
        return f"is {text!r}, and {user} has no home folder here: write the full path"
    return ""


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns the path with `~` expanded; used for every path given by the user.

    Args:
      path: as given by the user.
      name: of the field or flag, for the error message.

    Raises:
      errors.ConfigError: see `fault`.
    """
    if found := fault(path):
        raise errors.ConfigError([f"{name} {found}"])
    return pathlib.Path(os.path.expanduser(path))


def within(folder: pathlib.Path, path: str, name: str) -> str:
    """Returns a user's path, which starts in `folder` if it is relative.

    It is returned as it is if it is empty, or if `folder` is `pathlib.Path()`, the
    current one. For `name` and errors see `local`.
    """
    if not path or folder == pathlib.Path():
        return path
    return str(folder / local(path, name))
