"""Cutting a student into local modules."""
