"""What the demo tells of a kill, and how it ends where no cluster can be had."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web
from rich.console import Console

from cluster.config import load
from cluster.operate.state_file import ClusterFiles
from cluster.protocol import EngineState, Role
from cluster.store.records import ClusterStatus, WorkerStatus
from loadtests.cluster_demo import Demo, status_rows, verdict
from loadtests.cluster_process import LocalCluster
from loadtests.demo_stream import KILL_AFTER, about, victim, watch
from loadtests.processes import Server
from loadtests.token_streams import Sample, TokenStream

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 60.0
PAUSE_S = 0.3


def _worker(name: str, role: Role, pid: int, *, running: int = 0, experts: int = 0) -> WorkerStatus:
    return WorkerStatus(
        name=name,
        role=role,
        node_id="n0",
        address="",
        pid=pid,
        condition="serving",
        num_experts=experts,
        shards=(tuple(range(experts)),) if experts else (),
        state=EngineState(num_running=running),
    )


def _status(*workers: WorkerStatus, at_s: float = 10.0) -> ClusterStatus:
    return ClusterStatus(
        cluster="c", model="m", epoch=1, controller_id="i", at_s=at_s, num_layers=1, num_experts=16, workers=workers
    )


def _stream(ids: list[int], error: str = "") -> TokenStream:
    return TokenStream(samples=[Sample(ids)], error=error, is_done=not error)


STATUS = _status(
    _worker("attention-0", "attention", 1),
    _worker("attention-1", "attention", 2, running=1),
    _worker("expert-0", "expert", 3, experts=5),
    _worker("expert-1", "expert", 4, experts=11),
)


def test_the_victim_is_whoever_works_on_the_chat() -> None:
    for role, name in (("attention", "attention-1"), ("expert", "expert-1")):
        worker = victim(STATUS, cast(Role, role), since_s=9.0)
        assert worker is not None
        assert worker.name == name


def test_an_attention_worker_is_not_chosen_by_news_from_before_the_chat() -> None:
    assert victim(STATUS, "attention", since_s=11.0) is None
    assert victim(_status(_worker("attention-0", "attention", 1)), "attention", since_s=9.0) is None


def test_it_is_told_which_experts_are_lost() -> None:
    assert about(STATUS.workers[3], STATUS) == (
        "which holds 11 of 16 experts, in the first layer 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
    )
    assert about(STATUS.workers[1], STATUS) == "which runs this chat"


def test_the_table_has_a_row_for_each_worker() -> None:
    rows = status_rows(STATUS)
    assert rows[2] == ("n0", "attention-1", "2", "serving", "")
    assert rows[4] == ("n0", "expert-1", "4", "serving", "11 of 16")


@pytest.mark.parametrize(
    ("got", "text", "is_equal"),
    [
        (_stream([5, 6, 7]), "all 3 tokens equal", True),
        (_stream([5, 9, 7]), "of 3 tokens 0 lost, 0 repeated, 1 differing (at 1: 9 for 6)", False),
        (_stream([5, 6]), "of 3 tokens 1 lost, 0 repeated, 0 differing (at 2: None for 7)", False),
        (_stream([5, 6, 7, 7]), "of 3 tokens 0 lost, 1 repeated, 0 differing (at 3: 7 for None)", False),
        (_stream([5, 6, 7], "lost"), "of 3 tokens 0 lost, 0 repeated, 0 differing; lost", False),
    ],
)
def test_only_equal_tokens_of_a_finished_request_are_equal(got: TokenStream, text: str, is_equal: bool) -> None:
    assert verdict(got, _stream([5, 6, 7])) == (text, is_equal)


@pytest.mark.parametrize(("faults", "code"), [([], 0), (["expert-0 was killed: 1 lost"], 1)])
def test_the_exit_code_and_the_last_words_tell_the_same(faults: list[str], code: int) -> None:
    out = io.StringIO()
    demo = Demo(Console(file=out, soft_wrap=True), faults=faults)
    with demo.step("A chat") as found:
        found += ["3 tokens", "none lost"]
    assert demo.sum_up(61.24) == code
    shown = out.getvalue()
    assert "1. A chat" in shown
    assert "3 tokens, none lost" in shown
    assert "61.2" in shown
    assert ("every token was the same" in shown) == (code == 0)
    assert all(fault in shown for fault in faults)


# ---------------------------------------------------------------------------------------------------- a watched stream


@dataclass
class FakeCluster:
    """A worker that does nothing, and a gateway that pauses once that is dead."""

    worker: subprocess.Popen[bytes]
    server: Server = field(default_factory=lambda: Server("", "fake"))
    has_paused: bool = False

    def status(self) -> ClusterStatus:
        return _status(_worker("attention-0", "attention", self.worker.pid, running=1), at_s=time.time() + 1.0)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for index in range(2 * KILL_AFTER):
            if index == KILL_AFTER:
                if (await request.json()).get("is_disturbed"):
                    await asyncio.to_thread(self.worker.wait, DEADLINE_S)
                await asyncio.sleep(PAUSE_S)
            event = {"choices": [{"delta": {"content": f"w{index} "}, "token_ids": [index]}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.server = Server(f"http://127.0.0.1:{runner.addresses[0][1]}", "fake")
        ready.set()
        await ended.wait()
        await runner.cleanup()


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    fake, ready, ended, loop = FakeCluster(worker), threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(fake.serve(ready, ended),))
    thread.start()
    assert ready.wait(DEADLINE_S)
    yield fake
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()
    worker.kill()
    worker.wait(DEADLINE_S)


def _watch(cluster: FakeCluster, body: dict[str, Any], role: Role | None) -> tuple[TokenStream, Any, str]:
    out = io.StringIO()
    console = Console(file=out, soft_wrap=True)
    stream, killed = watch(console, cast(LocalCluster, cluster), body, role)
    return stream, killed, out.getvalue()


def test_a_kill_is_real_and_is_told_where_it_happened(cluster: FakeCluster) -> None:
    stream, killed, shown = _watch(cluster, {"is_disturbed": True}, "attention")
    assert cluster.worker.poll() == -signal.SIGKILL
    assert stream.error == ""
    assert stream.ids == list(range(2 * KILL_AFTER))
    assert killed.pid == cluster.worker.pid
    assert stream.pause_s(killed.at_s) >= PAUSE_S
    assert f"SIGKILL to process {cluster.worker.pid}: attention-0, which runs this chat" in shown
    assert "[the text stops ... goes on after " in shown
    words = [word for word in shown.split() if word[1:].isdigit() and word[0] == "w"]
    assert words == [f"w{index}" for index in range(2 * KILL_AFTER)]


def test_an_undisturbed_stream_is_its_text_alone(cluster: FakeCluster) -> None:
    stream, killed, shown = _watch(cluster, {}, None)
    assert killed is None
    assert shown.split() == [f"w{index}" for index in range(2 * KILL_AFTER)]
    assert stream.text.strip() == shown.strip()
    assert cluster.worker.poll() is None


# ------------------------------------------------------------------------------------------ where there is no cluster


def _demo(home: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtests.cluster_demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "FORETOKEN_HOME": str(home), **({"PATH": path} if path is not None else {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()[-1]


pytestmark = pytest.mark.needs("linux", "demo")


def test_without_redis_the_words_of_cluster_up_are_shown(tmp_path: Path) -> None:
    told = _last_line(_demo(tmp_path, path=str(tmp_path)))
    assert told.startswith("Error: redis-server is not installed: install it")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        told = _last_line(_demo(tmp_path, "--port", str(port)))
    assert told == f"Error: port {port} on 127.0.0.1 is in use: end what uses it, or choose another with --port"


def test_another_cluster_of_its_name_is_one_line(tmp_path: Path) -> None:
    with ClusterFiles(load({"home": tmp_path, "cluster_name": "demo"})).held():
        told = _last_line(_demo(tmp_path))
    assert told.startswith("Error: a cluster called demo runs on this machine: stop it with")
    assert "foretoken cluster down --cluster-name demo" in told
