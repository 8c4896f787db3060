"""`cluster worker` and `cluster controller --pods` as real processes on a real Redis, as Kubernetes runs them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cluster.environment import PACKAGES
from cluster.store import open_store
from cluster.store.records import ClusterStatus, WorkerRecord
from tests.support.redis_server import RedisServer
from tests.support.secret_places import look_at, variables
from tests.support.signals import send

pytestmark = pytest.mark.needs("redis", "demo", "linux")

DEADLINE_S = 90.0
POLL_S = 0.05


class _Pods:
    def __init__(self, redis: RedisServer, home: Path) -> None:
        self.home = home
        self.redis = redis
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        ours = {
            "STORE": redis.url,
            "HOME": str(home),
            "DEVICE": "cpu",
            "PORT": "0",
            "EXPERT_WORKERS": "1",
            "MAX_NUM_SEQS": "4",
            "MAX_MODEL_LEN": "256",
            "KV_CACHE_BYTES": "64MiB",
            "HOST_KERNELS": "false",
            "LEASE_S": "2",
            "DRAIN_TIMEOUT_S": "1",
            "TOKEN": "a token",
        }
        self.environment = os.environ | {f"FORETOKEN_{name}": value for name, value in ours.items()}
        self.environment |= {"PYTHONPATH": str(PACKAGES), "HF_TOKEN": "the hub's", "REDIS_PASSWORD": "the store's"}

    def start(self, name: str, *arguments: str) -> None:
        command = (sys.executable, "-P", "-m", "cluster.cli", "cluster", *arguments)
        self.processes[name] = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL)

    def status(self) -> ClusterStatus | None:
        value = self._get("status/cluster")
        return msgspec.json.decode(value, type=ClusterStatus) if value is not None else None

    def record(self, name: str) -> WorkerRecord | None:
        value = self._get(f"workers/{name}")
        return msgspec.json.decode(value, type=WorkerRecord) if value is not None else None

    def until_record(self, name: str, other_than: str = "") -> WorkerRecord:
        """The record of a worker, once it is that of another process."""
        deadline = time.monotonic() + DEADLINE_S
        while (record := self.record(name)) is None or record.worker_id == other_than:
            assert time.monotonic() < deadline, f"no new process of {name} was registered"
            assert all(process.poll() is None for process in self.processes.values()), "a pod ended"
            time.sleep(POLL_S)
        return record

    def _get(self, key: str) -> bytes | None:
        async def get() -> bytes | None:
            store = open_store(self.redis.url)
            try:
                entry = await store.get(key)
            finally:
                await store.close()
            return entry.value if entry is not None else None

        return asyncio.run(get())

    def until_well(self, *other_than: str) -> dict[str, WorkerRecord]:
        """The records of both workers, once both serve and the expert worker, a new process, holds every expert."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            assert all(process.poll() is None for process in self.processes.values()), "a pod ended"
            status, records = self.status(), [self.record(name) for name in ("attention-0", "expert-0")]
            found = {record.name: record for record in records if record is not None}
            if (
                status is not None
                and status.problem is None
                and len(found) == 2
                and not {record.worker_id for record in found.values()} & set(other_than)
                and {(w.pid, w.condition) for w in status.workers} == {(r.pid, "serving") for r in found.values()}
            ):
                return found
            time.sleep(POLL_S)
        raise AssertionError(f"not well: {self.status()}")

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[_Pods]:
    redis = RedisServer()
    redis.start()
    pods = _Pods(redis, tmp_path)
    try:
        yield pods
    finally:
        pods.end()
        redis.close()


def test_pods_register_are_led_and_come_back(pods: _Pods) -> None:
    pods.start("controller", "controller", "--pods")
    pods.start("attention", "worker", "attention", "--name", "demo-attention-0", "--node", "node-a")
    pods.start("expert", "worker", "expert", "--name", "demo-expert-0", "--node", "node-b")
    first = pods.until_well()
    assert first["expert-0"].node_id == "node-b"
    for record in first.values():
        process = look_at(record.pid)
        assert process is not None
        assert "workers.server" in process.command
        held = {name for name in variables(process) if name.startswith("FORETOKEN_")}
        assert held | {"HF_TOKEN", "REDIS_PASSWORD"} & variables(process).keys() == set()

    os.kill(first["expert-0"].pid, signal.SIGKILL)
    second = pods.until_well(first["expert-0"].worker_id)
    assert second["attention-0"] == first["attention-0"]

    pods.redis.kill()  # with all that it knew
    pods.redis.start()
    assert pods.until_well() == second

    expert = pods.processes.pop("expert")
    expert.send_signal(signal.SIGTERM)
    assert expert.wait(DEADLINE_S) == 0
    assert pods.record("expert-0") is None
    controller = pods.processes.pop("controller")
    controller.send_signal(signal.SIGTERM)
    assert controller.wait(DEADLINE_S) == 0
    assert pods.processes["attention"].poll() is None


def test_a_pod_ends_a_worker_that_hangs_and_one_that_was_killed_leaves_nothing_that_grows(pods: _Pods) -> None:
    pods.environment |= {"FORETOKEN_LEASE_S": "0.6", "TMPDIR": str(pods.home)}
    pods.start("expert", "worker", "expert", "--name", "demo-expert-0")
    first = pods.until_record("expert-0")
    send(first.pid, signal.SIGSTOP)
    second = pods.until_record("expert-0", first.worker_id)
    assert not Path(f"/proc/{first.pid}").exists()
    assert second.address == first.address

    for _ in range(2):
        pod = pods.processes.pop("expert")
        pod.kill()
        pod.wait()
        pods.start("expert", "worker", "expert", "--name", "demo-expert-0")
        second = pods.until_record("expert-0", second.worker_id)
    files = [path.relative_to(pods.home) for path in pods.home.rglob("*") if path.is_file()]
    assert files == [Path("clusters/foretoken/pods/expert-0.json")]
