"""Input that does not fit into memory, read and decoded on demand."""
