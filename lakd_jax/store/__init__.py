"""The directory of a run: lock, config, checkpoints, checksums."""
