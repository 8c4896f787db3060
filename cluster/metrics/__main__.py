"""Prints `docs/metrics.md`."""

from cluster.metrics.table import page

print(page(), end="")
