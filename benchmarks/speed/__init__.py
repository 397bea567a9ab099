"""Training speed beside peers: `python -m benchmarks.speed`."""
