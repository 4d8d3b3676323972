"""Paths that a user gives: on this machine, with `~` for the home folder."""

import os
import pathlib
import re

from lakd_jax import errors

# `Path` makes "gs:/b" of "gs://b", so that is refused, too. "c:/x" is none.
_URL = re.compile(r"://|^[A-Za-z][A-Za-z0-9+.-]+:/")


def fault(path: str | os.PathLike) -> str:
    """What is wrong with a path, whether or not anything is there; or ""."""
    text = os.fspath(path)
    if _URL.search(text):
        return (
            f"must be a local path, is {text!r}: buckets and URLs are not supported "
            "yet; use a local folder, or mount the bucket (e.g. with gcsfuse)"
        )
    if os.path.expanduser(text).startswith("~"):
        user = text.partition("/")[0]
        return f"is {text!r}, and {user} has no home folder here: write the whole path"
    return ""


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """The path, with `~` expanded; every path that a user gives becomes one here.

    Args:
      path: as it was given.
      name: of the field or flag, for the error message.

    Raises:
      errors.ConfigError: see `fault`.
    """
    if found := fault(path):
        raise errors.ConfigError([f"{name} {found}"])
    return pathlib.Path(os.path.expanduser(path))
