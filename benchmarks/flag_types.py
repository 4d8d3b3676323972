"""Types of command line arguments, for argparse."""

import argparse
from pathlib import Path

from lakd_jax import paths


def path(text: str) -> Path:
    """A path on this machine; the shell leaves the `~` of --out=~/DIR as it is."""
    if fault := paths.fault(text):
        raise argparse.ArgumentTypeError(fault)
    return paths.local(text, "")
