"""Input that does not fit into memory: read and decoded when it is needed."""
