"""Mechanics of one training run: state, step, loop and evaluation."""
