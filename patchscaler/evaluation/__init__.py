"""Evaluation: metrics, benchmarks and sweeps."""
