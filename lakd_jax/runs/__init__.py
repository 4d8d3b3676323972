"""Executes commands: from a config to the files of a run."""
