"""Fixtures of the tests of weight files."""

import sys

import pytest


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file of weights, where torch is not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)
    return tmp_path / "weights.pth"
