"""`cluster up` as a Ray job, on a real Ray with its dashboard."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest

from cluster.control import detached
from cluster.operate.children import marked, sweep
from cluster.operate.leftovers import kill_workers
from cluster.operate.state_file import ClusterFiles
from loadtests.token_streams import TokenStream, compare_streams, read_stream
from tests.support import cluster_up, secret_places
from tests.support.ray_cluster import RayCluster

pytestmark = [pytest.mark.needs("ray", "redis", "linux", "demo"), pytest.mark.timeout(400)]

NAME = "local"  # as the config file says
TOKEN = "0123456789abcdef"
NUM_TOKENS = 200
NUM_CLIENTS = 2  # so that one has a stream under way whenever the job is stopped
DRAINED = re.compile(r"cluster\.serve: stopping: (?s:.*) POST '/v1/completions' 200 ")  # it ended after the order came
RAY = (sys.executable, "-m", "ray.scripts.scripts", "job")


@pytest.fixture
def ray_with_dashboard() -> Iterator[RayCluster]:
    cluster = RayCluster(1, 60, dashboard=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def _ray_job(cluster: RayCluster, *arguments: str) -> str:
    done = subprocess.run(
        (*RAY, *arguments),
        cwd=cluster_up.ROOT,
        env=cluster.environment | {"RAY_API_SERVER_ADDRESS": f"http://{cluster.dashboard_address}"},
        capture_output=True,
        text=True,
        timeout=cluster_up.END_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_serves_drains_and_leaves_nothing(ray_with_dashboard: RayCluster, tmp_path: Path) -> None:
    cluster = ray_with_dashboard
    files = ClusterFiles(cluster_up.settings(tmp_path, NAME))
    variables = {
        "FORETOKEN_HOME": str(tmp_path),
        "FORETOKEN_PORT": "0",
        "FORETOKEN_TOKEN": TOKEN,
        "FORETOKEN_DRAIN_TIMEOUT_S": "120",  # on a machine that is busy
    }
    command = f"{sys.executable} -m cluster.cli cluster up --config configs/cluster/local.yaml"
    try:
        _ray_job(
            cluster,
            "submit",
            "--submission-id=up",
            "--no-wait",
            "--working-dir=.",
            "--runtime-env-json=" + json.dumps({"env_vars": variables}),
            "--",
            *command.split(),
        )
        url = _wait_ready(cluster)
        state = cluster_up.wait_state(files)
        worker, _ = [int(path.read_text()) for path in files.logs.glob("expert-*.pid")]
        code = Path(os.readlink(f"/proc/{worker}/cwd")).name
        assert code.startswith("_ray_pkg_"), code  # what was uploaded, not this checkout
        beside = [process for pid in marked(cluster.run_id) if (process := secret_places.look_at(pid)) is not None]
        of_workers = [process for process in beside if re.search(r"ray::WorkerActor|workers\.server", process.command)]
        assert len(of_workers) >= 8
        assert all(TOKEN not in process.environment.decode(errors="replace") for process in of_workers)
        expected = _stream(url)
        assert (expected.error, len(expected.ids)) == ("", NUM_TOKENS)
        begun, over = [threading.Event() for _ in range(NUM_CLIENTS)], threading.Event()
        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            clients = [threads.submit(_streams_until_refused, url, event, over) for event in begun]
            try:
                for event in begun:
                    assert event.wait(cluster_up.START_TIMEOUT_S)
                _ray_job(cluster, "stop", "--no-wait", "up")
                cluster_up.wait_ended(files)
            finally:
                over.set()
            streams = [stream for client in clients for stream in client.result()]
        assert all(not stream.error and compare_streams(stream, expected).is_none for stream in streams)
        assert DRAINED.search((files.logs / "gateway.log").read_text())
        assert not Path(state.folder).exists()
        for path in files.logs.glob("*.pid"):
            assert not detached.is_running(int(path.read_text()), path.stem)
        assert [node.pid for node in cluster.nodes if node.pid is None] == []  # their Ray goes on
    finally:
        if (left := files.read()) is not None:
            sweep(left.run_id, left.folder)
        kill_workers(files)


def _stream(url: str, on_tokens: Callable[[int], None] = lambda _: None) -> TokenStream:
    body = {"model": "foretoken-demo", "prompt": "Once upon a time", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    stream = TokenStream()

    async def read() -> None:
        async with aiohttp.ClientSession() as session:
            target = f"{url}/v1/completions"
            await read_stream(session, target, body | {"temperature": 0}, stream, cluster_up.END_TIMEOUT_S, on_tokens)

    asyncio.run(read())
    return stream


def _streams_until_refused(url: str, begun: threading.Event, over: threading.Event) -> list[TokenStream]:
    """One after the other, those that got a token; until one is refused, as by a gateway that drains, or has ended."""
    streams = []
    while not over.is_set() and (stream := _stream(url, lambda _: begun.set())).ids:
        streams.append(stream)
    return streams


def _wait_ready(cluster: RayCluster) -> str:
    deadline = time.monotonic() + cluster_up.START_TIMEOUT_S
    while (found := cluster_up.READY.search(shown := _ray_job(cluster, "logs", "up"))) is None:
        assert time.monotonic() < deadline, shown
        assert not re.search(r"^Error: ", shown, re.MULTILINE), shown
        time.sleep(0.5)
    return found[1]
