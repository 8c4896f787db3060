"""The APIs that a generation can be asked for by: one file each, over the same way through the gateway."""
