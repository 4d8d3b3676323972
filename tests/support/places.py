"""Folders of tests: on a disk, or in the bucket of `fake_bucket`."""

import shutil

import fake_bucket

from lakd_jax import paths
from lakd_jax.store import bucket


def in_bucket(name):
    """The folder of this name."""
    return paths.of(f"gs://{fake_bucket.BUCKET}/{name}")


def files(folder):
    """All files below a folder."""
    found = []
    for path in folder.iterdir():
        found += files(path) if path.is_dir() else [path]
    return sorted(found)


def copied(source, target):
    """Copies a folder within its kind of place; returns the new one."""
    for file in files(source):
        copy = target / file.relative_to(source)
        bucket.make_folder(copy.parent)
        copy.write_bytes(file.read_bytes())
    return target


def remove(folder):
    """Deletes a folder with everything below it."""
    folder.rmtree() if paths.is_bucket(folder) else shutil.rmtree(folder)
