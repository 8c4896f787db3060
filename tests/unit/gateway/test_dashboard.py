"""The page, and the numbers that it shows."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from cluster.errors import StoreUnavailableError
from cluster.gateway import status as status_module
from cluster.gateway.status import StoreStatus
from cluster.protocol import EngineState
from cluster.store.base import Versioned
from cluster.store.memory import MemoryStore
from cluster.store.records import STATUS_KEY, ClusterStatus, NodeStatus, WorkerStatus
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio


class Links(HTMLParser):
    """What a page loads, and what a strict policy would block in it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loaded += [values[name] or "" for name in ("src", "href") if tag != "a" and name in values]
        self.inline += [name for name in values if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in values):
            self.inline.append(tag)


async def test_the_page_and_all_that_it_loads_are_ours(served: Served) -> None:
    page = await served.http.get("/")
    links = Links()
    links.feed(page.text)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not links.inline
    types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert {link.rpartition(".")[2] for link in links.loaded} == set(types)
    loaded = list(links.loaded)
    for link in loaded:
        assert not re.match(r"/|[a-z]+:", link), "relative, so that it works behind a path"
        part = await served.http.get(f"/{link}")
        assert part.status_code == 200
        assert part.headers["content-type"].startswith(types[link.rpartition(".")[2]])
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", part.text)
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", part.text)
        imported = [f"dashboard/{name}" for name in re.findall(r' from "\./([^"]+)"', part.text)]
        loaded += [link for link in imported if link not in loaded]
    assert len(loaded) > len(links.loaded)
    for answer in (page, part):
        policy = dict(item.split(" ", 1) for item in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_one_worker_of_our_own(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve()
    await served.ready()
    body = (await served.http.get("/cluster")).json()
    assert (body["model"], body["cluster"], body["epoch"], body["problem"]) == (MODEL, None, None, None)
    assert (body["is_stale"], body["num_experts"]) == (False, 0)
    nothing = {"count": 0, "p50_s": None, "p99_s": None}
    assert body["gateway"]["latency"] == {"window_s": 60.0, "ttft": nothing, "itl": nothing}
    assert body["gateway"]["needs_key"] is False
    assert [node["workers"] for node in body["nodes"]] == [["worker"]]
    assert body["workers"] == [
        {
            "name": "worker",
            "role": "all",
            "node_id": "this machine",
            "condition": "serving",
            "worker_id": "worker-1",
            "num_running": 3,
            "num_waiting": 0,
            "pages_total": 64,
            "pages_free": 48,
            "generated_tokens": 7,
            "prompt_tokens": 0,
            "steps": 0,
            "step_tokens": 0,
            "sequence_steps": 0,
            "expert_calls": 0,
            "expert_rows": 0,
            "expert_s": 0.0,
            "num_experts": 0,
            "shards": [],
        }
    ]
    assert (await served.chat()).status_code == 200
    latency = (await served.http.get("/cluster")).json()["gateway"]["latency"]
    num_tokens = len(worker.answer(worker.submits[0]))
    assert (latency["ttft"]["count"], latency["itl"]["count"]) == (1, num_tokens - 1)
    assert 0 < latency["itl"]["p50_s"] <= latency["itl"]["p99_s"] < DEADLINE_S
    assert 0 < latency["ttft"]["p50_s"] == latency["ttft"]["p99_s"] < DEADLINE_S
    await worker.kill()
    while (body := (await served.http.get("/cluster")).json())["workers"][0]["condition"] == "serving":
        pass
    assert body["workers"][0]["condition"] == "lost"
    assert "no worker" in body["problem"]


def cluster_status(at_s: float) -> ClusterStatus:
    return ClusterStatus(
        cluster="ours",
        model="m",
        epoch=4,
        controller_id="c-secret",
        at_s=at_s,
        num_layers=2,
        num_experts=4,
        nodes=(NodeStatus(node_id="n1", memory_bytes=5, devices=("cpu",)), NodeStatus(node_id="n2", memory_bytes=6)),
        workers=(
            WorkerStatus(
                name="attention-0", role="attention", node_id="n1", address="10.9.8.7:4321", pid=424242,
                condition="serving", state=EngineState(worker_id="a", num_running=2, generated_tokens=9),
            ),
            WorkerStatus(
                name="expert-0", role="expert", node_id="n2", address="10.9.8.7:4322", pid=424243,
                condition="starting", num_experts=3, shards=((0, 1), (3,)),
                state=EngineState(worker_id="e", expert_calls=3, expert_rows=12, expert_s=0.5),
            ),
        ),
        problem="a node is missing",
    )  # fmt: skip


async def put(store: MemoryStore, value: bytes) -> None:
    held: Versioned | None = await store.get(STATUS_KEY)
    await store.compare_and_set(STATUS_KEY, value, expected=held.version if held else 0)


class Away(MemoryStore):
    is_gone = False

    async def get(self, key: str) -> Any:
        if self.is_gone:
            raise StoreUnavailableError("the store (Redis) at redis://:sesame@10.9.8.7 cannot be used")
        return await super().get(key)


async def test_a_cluster_is_as_its_controller_says(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "FRESH_S", 0.0)
    store = Away()
    served = await serve(status=StoreStatus(store))
    await served.ready()

    async def look() -> dict[str, Any]:
        response = await served.http.get("/cluster")
        assert response.status_code == 200
        assert response.headers["cache-control"] == "no-store"
        assert not re.search(r"10\.9\.8\.7|42424|secret|sesame", response.text)
        body: dict[str, Any] = response.json()
        return body

    body = await look()
    assert (body["nodes"], body["workers"], body["is_stale"]) == ([], [], False)
    assert "no status yet" in body["problem"]

    await put(store, msgspec.json.encode(cluster_status(time.time())))
    body = await look()
    assert (body["cluster"], body["epoch"], body["problem"]) == ("ours", 4, "a node is missing")
    assert (body["num_layers"], body["num_experts"], body["is_stale"]) == (2, 4, False)
    assert [(node["node_id"], node["workers"]) for node in body["nodes"]] == [
        ("n1", ["attention-0"]),
        ("n2", ["expert-0"]),
    ]
    attention, expert = body["workers"]
    assert (attention["num_running"], attention["generated_tokens"], attention["worker_id"]) == (2, 9, "a")
    assert (expert["condition"], expert["num_experts"], expert["shards"]) == ("starting", 3, [[0, 1], [3]])
    assert (expert["expert_calls"], expert["expert_rows"], expert["expert_s"]) == (3, 12, 0.5)
    assert body["gateway"]["workers_connected"] == 1

    await put(store, msgspec.json.encode(cluster_status(time.time() - 60)))
    body = await look()
    assert body["is_stale"]
    assert 59 < body["age_s"] < 90

    store.is_gone = True
    body = await look()
    assert body["problem"] == "the store does not answer"
    assert len(body["workers"]) == 2
    store.is_gone = False
    await put(store, b"{}")
    assert "another version" in (await look())["problem"]


async def test_many_pages_ask_the_store_once(serve: Serve) -> None:
    class Counted(MemoryStore):
        num_gets = 0

        async def get(self, key: str) -> Any:
            self.num_gets += 1
            return await super().get(key)

    store = Counted()
    served = await serve(status=StoreStatus(store))
    started = time.monotonic()
    for _ in range(20):
        assert (await served.http.get("/cluster")).status_code == 200
    assert store.num_gets <= 1 + (time.monotonic() - started) / status_module.FRESH_S
