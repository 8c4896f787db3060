"""Routed experts: where their weights are and who computes them."""
