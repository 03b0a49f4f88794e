"""The measurements behind the claims in docs/. Run one with ``python -m benchmarks.NAME``."""
