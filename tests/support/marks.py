"""Marks of parametrised tests."""

import pytest


def others_long(names, quick):
    """Marks all names but the `quick` ones as long."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.long) for n in names]
