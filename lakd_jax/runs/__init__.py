"""What a command does: from a config to the files of a run."""
