"""Attention over paged KV: the plan of a step and the kernels' face."""
