"""A whole cluster of real processes, from `cluster up` to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from cluster.control import detached
from cluster.environment import MARK
from cluster.operate.children import in_session, marked, sweep
from cluster.operate.leftovers import kill_workers
from cluster.operate.state_file import ClusterFiles, SupervisorState
from cluster.operate.up import is_ready
from cluster.protocol import Lead
from cluster.store.records import LEAD_KEY, STATUS_KEY, ClusterStatus, WorkerStatus
from cluster.store.redis import RedisStore
from tests.support import cluster_up, secret_places
from tests.support.cluster_up import Up, complete, foretoken
from tests.support.processes import has_ended
from tests.support.redis_server import RedisServer
from tests.support.signals import send

pytestmark = [pytest.mark.needs("ray", "redis", "linux", "demo"), pytest.mark.timeout(300)]

NAME = "e2e"
DEADLINE_S = 90.0
PROMPT = "Once upon a time"
RECONNECT_TIMEOUT_S = 2  # Ray's nodes end when their head is away for so long

HUB_TOKEN = "of-whoever-starts-it"
ADMIN_KEY = "of-who-administers-it"
# Which secrets a process gets in its environment, by what stands on its command line; the first that fits.
MAY_HAVE: dict[str, set[str]] = {
    "cluster up": {"hub", "admin"},  # the one in the foreground and the supervisor: as they were started
    "cluster gateway": {"token", "redis", "admin"},
    "cluster controller": {"token", "redis", "ray"},
    "cluster.control.ray_bridge": {"ray"},
    "workers.server": set(),  # the token comes in by its standard input
    "redis-server": set(),  # as does the password
    "ray::": {"ray"},  # Ray's name for a process that runs an actor or waits for one, and for its agents
    "ray/": {"ray"},
    "ray.": {"ray"},
}
RAY_CLIENT = """
import sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, namespace="a stranger's")
except Exception as error:
    print(error)
else:
    print("in:", len(ray.nodes()), "nodes")
"""


@dataclass
class Running:
    home: Path
    files: ClusterFiles
    up: Up
    url: str

    @property
    def state(self) -> SupervisorState:
        return cluster_up.wait_state(self.files)

    def controller(self) -> dict[str, str]:
        """The controller's environment."""
        process = secret_places.look_at(self.state.children["controller"])
        assert process is not None
        return secret_places.variables(process)

    def secrets(self) -> dict[str, str]:
        """Every secret, as it stands where it may stand."""
        given = self.controller()
        password = urlsplit(given["FORETOKEN_STORE"]).password
        assert password
        return {
            "token": given["FORETOKEN_TOKEN"],
            "redis": password,
            "ray": given["RAY_AUTH_TOKEN"],
            "hub": HUB_TOKEN,
            "admin": ADMIN_KEY,
        }

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
    files = ClusterFiles(cluster_up.settings(home, NAME))
    tuned = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_TIMEOUT_S)}
    given = {"HF_TOKEN": HUB_TOKEN, "FORETOKEN_ADMIN_API_KEY": ADMIN_KEY}
    up = Up(home, "--local", "3", "--cluster-name", NAME, environment=tuned | given)
    try:
        yield Running(home, files, up, up.wait_ready())
        state = cluster_up.wait_state(files)
        down = foretoken(home, "cluster", "down", "--cluster-name", NAME)
        assert (down.returncode, down.stdout) == (0, f"{NAME} has ended\n")
        assert up.wait_end() == 0
        _assert_nothing_is_left(files, state)
        assert foretoken(home, "cluster", "status", "--cluster-name", NAME).returncode == 1
    finally:
        if (left := files.read()) is not None:
            sweep(left.run_id, left.folder)
        kill_workers(files)


def _assert_nothing_is_left(files: ClusterFiles, state: SupervisorState) -> None:
    assert marked(state.run_id) == []
    assert not Path(state.folder).exists()
    assert files.read() is None
    for path in files.logs.glob("*.pid"):
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


def test_each_process_has_its_secrets_and_no_others(running: Running) -> None:
    state, secrets = running.state, running.secrets()
    assert len(set(secrets.values())) == len(secrets)
    assert not [(a, b) for a in secrets for b in secrets if a != b and secrets[a] in secrets[b]]
    workers = {worker["pid"] for worker in running.status()["workers"]}
    pids = {*marked(state.run_id, state.folder), state.pid, running.up.process.pid}
    assert workers | set(state.children.values()) <= pids
    seen = set()
    for process in filter(None, map(secret_places.look_at, pids)):
        kind = next((kind for kind in MAY_HAVE if kind in process.command), "")
        seen.add(kind)
        has = secret_places.found_in(process.environment, secrets)
        # Some processes of Ray's write their name over it.
        assert has == MAY_HAVE.get(kind, set()) or (kind.startswith("ray") and not has), process.command
        assert secret_places.found_in(process.command.encode(), secrets) == set()
        if process.pid in workers:
            assert kind == "workers.server"
            ours = {name for name in secret_places.variables(process) if name.startswith(("FORETOKEN_", "RAY_"))}
            assert ours == {MARK}
    assert seen >= set(MAY_HAVE)


def test_no_file_that_others_can_read_has_a_secret(running: Running) -> None:
    """The home with its logs, what `cluster up` printed, and the folder of Ray's sessions, its tables and Redis."""
    folder = Path(running.state.folder)
    assert folder.stat().st_mode & 0o077 == 0
    assert any(folder.glob("r0/session_*/logs/*"))
    found = secret_places.files_with((running.home, folder), running.secrets())
    assert found == {running.files.state: ({"redis"}, 0o600)}


@pytest.mark.parametrize("is_right", [True, False])
def test_its_ray_lets_in_who_has_its_token_only(running: Running, is_right: bool, tmp_path: Path) -> None:
    controller = running.controller()
    wrong = {"wrong": "0" * 64, "the cluster's": controller["FORETOKEN_TOKEN"]}
    tries = {
        "missing": {"RAY_AUTH_MODE": "token"},
        "none": {"RAY_AUTH_MODE": "disabled"},
        **{name: {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} for name, token in wrong.items()},
    }
    if is_right:
        tries = {"right": {name: controller[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}}
    command = [sys.executable, "-c", RAY_CLIENT, controller["RAY_ADDRESS"]]
    clients = {
        name: subprocess.Popen(
            command,
            env=cluster_up.clean_environment(tmp_path, {"HOME": str(tmp_path), **given}),  # a token may lie in a home
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, given in tries.items()
    }
    try:
        said = {name: client.communicate(timeout=DEADLINE_S)[0] for name, client in clients.items()}
    finally:
        for client in clients.values():
            client.kill()
            client.wait()
    if is_right:
        assert said["right"].splitlines()[-1] == "in: 3 nodes"
        return
    assert "no authentication token was found" in said.pop("missing")
    for shown in said.values():
        assert "InvalidAuthToken" in shown
        assert "Failed to connect to Ray" in shown
        assert "in: " not in shown


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


def test_a_controller_that_hangs_is_replaced_before_the_workers_miss_it(running: Running) -> None:
    before = running.status()
    hung = running.state.children["controller"]
    send(hung, signal.SIGSTOP)
    _wait(lambda: running.state.children.get("controller") not in (None, hung))
    _wait(lambda: running.status()["epoch"] > before["epoch"])
    _wait(running.is_serving)
    assert _pids(running.status()) == _pids(before)


def test_a_part_that_hangs_is_replaced_and_the_workers_serve_on(running: Running) -> None:
    """The gateway, the store and the process of a Ray node that cannot end itself any more."""
    before, text = running.status(), complete(running.url, PROMPT, 16)["choices"][0]["text"]
    children = running.state.children
    (raylet,) = [pid for pid in in_session(children["ray-1"]) if _program(pid).endswith(b"/raylet")]
    hung = {"gateway": children["gateway"], "redis": children["redis"], "ray-1": raylet}
    for pid in hung.values():
        send(pid, signal.SIGSTOP)
    for name in hung:
        _wait(lambda name=name: running.state.children.get(name) not in (None, children[name]))  # type: ignore[misc]
    assert all(map(has_ended, hung.values()))
    _wait(running.is_serving)
    assert _pids(running.status()) == _pids(before)
    assert complete(running.url, PROMPT, 16)["choices"][0]["text"] == text


def _program(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]


def _pids(status: dict[str, Any]) -> dict[str, int]:
    return {worker["name"]: worker["pid"] for worker in status["workers"]}


def test_requests_and_workers_outlive_rays_head(running: Running) -> None:
    """Past the time after which the other nodes and all actors end as well; then the workers are adopted."""
    before = complete(running.url, PROMPT, 400)["choices"][0]["text"]
    workers = {worker["name"]: worker["pid"] for worker in running.status()["workers"]}
    nodes = {name: pid for name, pid in running.state.children.items() if name.startswith("ray-")}
    got: list[str] = []
    meanwhile = threading.Thread(target=lambda: got.append(complete(running.url, PROMPT, 400)["choices"][0]["text"]))
    meanwhile.start()

    def have_given_up() -> bool:
        now = running.state.children
        if "ray-0" in now:  # it is struck again whenever it is back
            with contextlib.suppress(ProcessLookupError):
                os.kill(now["ray-0"], signal.SIGKILL)
        return all(now.get(name) != pid for name, pid in nodes.items())

    _wait(have_given_up)
    _wait(lambda: all(running.state.children.get(name) not in (None, pid) for name, pid in nodes.items()))
    meanwhile.join()
    assert got == [before]
    _wait(running.is_serving)
    assert {worker["name"]: worker["pid"] for worker in running.status()["workers"]} == workers
    assert complete(running.url, PROMPT, 16)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        (
            "--max-model-len",
            "20000",
            r"attention-\d does not start: max_model_len 20000 is over the checkpoint's \d+",
        ),
        ("--kv-cache-bytes", "900TiB", r"attention worker 1 of 2 needs \d+ bytes"),
    ],
)
def test_what_can_never_start_ends_the_command_with_its_own_error(
    tmp_path: Path, option: str, value: str, said: str
) -> None:
    name = "never"
    up = Up(tmp_path, "--local", "1", "--cluster-name", name, option, value)
    files = ClusterFiles(cluster_up.settings(tmp_path, name))
    state = cluster_up.wait_state(files)
    try:
        assert up.process.wait(cluster_up.START_TIMEOUT_S) == 1  # sooner than `start_timeout_s`
        assert re.search(rf"Error: the cluster does not come up: {said}", up.output), up.output
        _assert_nothing_is_left(files, state)
    finally:
        sweep(state.run_id, state.folder)
        kill_workers(files)


def test_a_store_in_which_another_models_controller_leads_is_refused(tmp_path: Path) -> None:
    """Its status, all serving, is not taken for that of the controller that was just started."""
    name, ended = "led", threading.Event()
    worker = WorkerStatus(name="expert-0", role="expert", node_id="n", address="a:1", pid=1, condition="serving")
    status = ClusterStatus(
        cluster=name,
        model="another",
        epoch=7,
        controller_id="theirs",
        at_s=0.0,
        num_layers=1,
        num_experts=1,
        workers=(worker,),
    )

    async def lead(url: str) -> None:
        async with RedisStore(url, namespace=name) as store:
            held = msgspec.json.encode(Lead(epoch=7, controller_id="theirs"))
            await store.compare_and_set(LEAD_KEY, held, expected=0)
            version = 0
            while not ended.is_set():
                value = msgspec.json.encode(msgspec.structs.replace(status, at_s=time.time()))
                version = await store.compare_and_set(STATUS_KEY, value, expected=version) or version
                await asyncio.sleep(0.2)

    redis = RedisServer()
    redis.start()
    leads = threading.Thread(target=lambda: asyncio.run(lead(redis.url)))
    leads.start()
    try:
        up = Up(tmp_path, "--local", "1", "--cluster-name", name, environment={"FORETOKEN_STORE": redis.url})
        assert up.process.wait(cluster_up.START_TIMEOUT_S) == 1
        assert "Error: controller theirs, which something else started, leads the cluster led" in up.output
        assert "and serves another, not foretoken-demo" in up.output
    finally:
        ended.set()
        leads.join()
        redis.close()
