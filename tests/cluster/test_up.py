"""A whole cluster of real processes, from `cluster up` to its end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.control import detached
from cluster.operate.children import marked, sweep
from cluster.operate.leftovers import kill_workers
from cluster.operate.state_file import Places, SupervisorState
from cluster.operate.up import is_ready
from tests.support import cluster_up
from tests.support.cluster_up import Up, complete, foretoken

pytestmark = [pytest.mark.needs("ray", "redis", "linux", "demo"), pytest.mark.timeout(300)]

NAME = "e2e"
DEADLINE_S = 90.0
PROMPT = "Once upon a time"
RECONNECT_TIMEOUT_S = 2  # Ray's nodes end when their head is away for so long; a head takes longer to start again


@dataclass
class Running:
    home: Path
    places: Places
    up: Up
    url: str

    @property
    def state(self) -> SupervisorState:
        return cluster_up.wait_state(self.places)

    def status(self) -> dict[str, Any]:
        shown = foretoken(self.home, "cluster", "status", "--cluster-name", NAME, "--json")
        assert shown.returncode == 0, shown.stdout + shown.stderr
        told: dict[str, Any] = json.loads(shown.stdout)
        return told

    def is_serving(self) -> bool:
        status = self.status()
        return (
            is_ready(self.url)
            and status["problem"] is None
            and {worker["condition"] for worker in status["workers"]} == {"serving"}
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A cluster for all tests, which leave it serving. At the end `cluster down` stops it, and nothing is left."""
    home = tmp_path_factory.mktemp("home")
    places = Places(cluster_up.settings(home, NAME))
    tuned = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_TIMEOUT_S)}
    up = Up(home, "--local", "3", "--cluster-name", NAME, environment=tuned)
    try:
        yield Running(home, places, up, up.wait_ready())
        state = cluster_up.wait_state(places)
        down = foretoken(home, "cluster", "down", "--cluster-name", NAME)
        assert (down.returncode, down.stdout) == (0, f"{NAME} has ended\n")
        assert up.wait_end() == 0
        _assert_nothing_is_left(places, state)
        assert foretoken(home, "cluster", "status", "--cluster-name", NAME).returncode == 1
    finally:
        if (left := places.read()) is not None:
            sweep(left.run_id)
        kill_workers(places)


def _assert_nothing_is_left(places: Places, state: SupervisorState) -> None:
    assert marked(state.run_id) == []
    assert not Path(state.folder).exists()
    assert places.read() is None
    for path in places.logs.glob("*.pid"):
        assert not detached.is_running(int(path.read_text()), path.stem)


def _wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_status_shows_nodes_workers_and_processes(running: Running) -> None:
    status = running.status()
    assert len(status["nodes"]) == 3
    assert [worker["name"] for worker in status["workers"]] == ["attention-0", "attention-1", "expert-0", "expert-1"]
    assert {worker["condition"] for worker in status["workers"]} == {"serving"}
    held = [worker["num_experts"] for worker in status["workers"] if worker["role"] == "expert"]
    assert held[0] == held[1] > 0  # half of the experts each
    assert status["url"] == running.url
    assert set(status["processes"]) == {"redis", "ray-0", "ray-1", "ray-2", "controller", "gateway"}
    table = foretoken(running.home, "cluster", "status", "--cluster-name", NAME).stdout
    assert "expert-1" in table


def test_its_token_is_on_no_command_line(running: Running) -> None:
    state = running.state
    assert running.places.state.stat().st_mode & 0o077 == 0
    pids = marked(state.run_id)
    assert len(pids) > 10
    for pid in pids:
        assert state.token not in Path(f"/proc/{pid}/cmdline").read_text()


def test_a_second_one_of_its_name_is_refused(running: Running) -> None:
    second = foretoken(running.home, "cluster", "up", "--local", "1", "--cluster-name", NAME)
    assert second.returncode == 1
    assert f"a cluster called {NAME} runs on this machine (process {running.state.pid})" in second.stderr


@pytest.mark.parametrize("name", ["gateway", "controller", "redis"])
def test_a_process_that_dies_is_started_again(running: Running, name: str) -> None:
    before = complete(running.url, PROMPT, 16)["choices"][0]["text"]
    killed = running.state.children[name]
    os.kill(killed, signal.SIGKILL)
    _wait(lambda: running.state.children.get(name) not in (None, killed))
    _wait(running.is_serving)
    assert complete(running.url, PROMPT, 16)["choices"][0]["text"] == before


def test_requests_and_workers_outlive_rays_head(running: Running) -> None:
    """Past the time after which the other nodes and all actors end as well; then the workers are adopted."""
    before = complete(running.url, PROMPT, 400)["choices"][0]["text"]
    workers = {worker["name"]: worker["pid"] for worker in running.status()["workers"]}
    nodes = {name: pid for name, pid in running.state.children.items() if name.startswith("ray-")}
    got: list[str] = []
    meanwhile = threading.Thread(target=lambda: got.append(complete(running.url, PROMPT, 400)["choices"][0]["text"]))
    meanwhile.start()
    os.kill(nodes["ray-0"], signal.SIGKILL)
    _wait(lambda: all(running.state.children.get(name) not in (None, pid) for name, pid in nodes.items()))
    meanwhile.join()
    assert got == [before]
    _wait(running.is_serving)
    assert {worker["name"]: worker["pid"] for worker in running.status()["workers"]} == workers
    assert complete(running.url, PROMPT, 16)["usage"]["completion_tokens"] == 16
