"""Types of command line arguments, for argparse."""

import argparse
from pathlib import Path

from lakd_jax import paths


def path(text: str) -> Path:
    """Returns a local path; expands `~`, which shells leave alone in --out=~/DIR."""
    if fault := paths.fault(text):
        raise argparse.ArgumentTypeError(fault)
    return paths.local(text, "")
