"""Load on a running server, and comparisons with other programs on the same machine."""
