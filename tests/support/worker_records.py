"""A worker's record for tests that keep or read one; nothing listens at its address."""

from __future__ import annotations

from cluster.store.records import WorkerRecord

RECORD = WorkerRecord(
    name="expert-0",
    role="expert",
    node_id="n0",
    device_id="cpu",
    address="a:1",
    worker_id="w",
    pid=7,
    memory_bytes=100,
)
