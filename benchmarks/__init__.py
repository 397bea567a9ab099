"""Measurements against peers: `python -m benchmarks.<name>`. Not part of the installed package."""
