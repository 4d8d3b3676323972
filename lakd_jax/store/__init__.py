"""The folder of a run on disk: lock, config, checkpoints, checksums."""
