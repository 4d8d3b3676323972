"""The runtime environment: devices, processes and signals."""
