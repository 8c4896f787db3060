from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from cluster.config import Settings, load
from cluster.operate import status as status_command
from cluster.operate.show import node_rows, print_status, work_per_s, worker_rows
from cluster.operate.status import as_text
from cluster.protocol import EngineState
from cluster.store import open_store
from cluster.store.records import STALE_S, STATUS_KEY, ClusterStatus, LeftOut, NodeStatus, WorkerStatus
from cluster.store.redis import RedisStore
from tests.support.redis_server import RedisServer

GIB = 2**30


def _status(at_s: float, generated_tokens: int, worker_id: str = "w", problem: str | None = None) -> ClusterStatus:
    return ClusterStatus(
        cluster="one",
        model="demo",
        epoch=3,
        controller_id="c",
        at_s=at_s,
        num_layers=2,
        num_experts=8,
        nodes=(NodeStatus(node_id="n0", memory_bytes=2 * GIB, devices=("cpu",)),),
        workers=(
            WorkerStatus(
                name="attention-0",
                role="attention",
                node_id="n0",
                address="127.0.0.1:1",
                pid=11,
                condition="serving",
                state=EngineState(worker_id=worker_id, num_running=4, num_waiting=5, generated_tokens=generated_tokens),
            ),
            WorkerStatus(
                name="expert-0",
                role="expert",
                node_id="n0",
                address="127.0.0.1:2",
                pid=12,
                condition="lost",
                num_experts=8,
            ),
        ),
        problem=problem,
    )


def test_rates_are_tokens_over_time_and_never_those_of_another_process() -> None:
    assert work_per_s(_status(10.0, 100), _status(12.0, 150)) == {"attention-0": 25.0, "expert-0": 0.0}
    assert work_per_s(_status(10.0, 100, "old"), _status(12.0, 150, "new"))["attention-0"] == 0.0
    assert work_per_s(_status(10.0, 100), _status(10.0, 150))["attention-0"] == 0.0


def test_the_tables_have_a_row_for_each_node_and_worker() -> None:
    status = _status(10.0, 0)
    assert node_rows(status)[1:] == [("n0", "up", "2.0 GiB", "cpu", "attention-0, expert-0")]
    assert worker_rows(status, {"attention-0": 12.34, "expert-0": 567.8})[1:] == [
        ("attention-0", "n0", "serving", "4", "5", "12.3", "", "", "11"),
        ("expert-0", "n0", "lost", "", "", "", "8", "568", "12"),
    ]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load({"home": tmp_path, "cluster_name": "one"})


def test_without_a_cluster_it_says_so(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_command.run(settings, as_json=False) == 1
    assert "no cluster called one runs here" in capsys.readouterr().out


def test_a_store_that_is_gone_is_an_answer(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    lost = settings.model_copy(update={"store": SecretStr("unix:///nowhere/redis.sock")})
    assert status_command.run(lost, as_json=True) == 1
    assert "the store (Redis) cannot be used" in capsys.readouterr().out


def test_the_json_has_every_field() -> None:
    told = json.loads(as_text(_status(10.0, 7), {"attention-0": 0.12345, "expert-0": 7.0}, None))
    assert told["problem"] is None
    assert told["workers"][0]["state"]["generated_tokens"] == 7
    assert told["workers"][0]["num_experts"] == 0
    assert (told["tokens_per_s"], told["rows_per_s"]) == ({"attention-0": 0.123}, {"expert-0": 7.0})


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def led(redis: RedisServer, settings: Settings) -> Iterator[Settings]:
    """A controller that writes a status ten times a second: 50 tokens a second, and a problem."""
    ended = threading.Event()

    async def write() -> None:
        store = open_store(redis.url, namespace="one")
        began, version = time.monotonic(), 0
        while not ended.is_set():
            passed_s = time.monotonic() - began
            value = msgspec.json.encode(_status(time.time(), int(50 * passed_s), problem="expert-0 is lost"))
            version = await store.compare_and_set(STATUS_KEY, value, expected=version) or version
            await asyncio.sleep(0.1)
        await store.close()

    thread = threading.Thread(target=lambda: asyncio.run(write()))
    thread.start()
    yield settings.model_copy(update={"store": SecretStr(redis.url)})
    ended.set()
    thread.join()


@pytest.mark.needs("redis")
def test_it_shows_what_the_controller_wrote(led: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    while status_command.run(led, as_json=True) != 0:  # the first status may not be written yet
        capsys.readouterr()
    told = json.loads(capsys.readouterr().out)
    assert (told["cluster"], told["epoch"], told["url"], told["processes"]) == ("one", 3, None, {})
    assert told["tokens_per_s"]["attention-0"] == pytest.approx(50, rel=0.3)
    assert status_command.run(led, as_json=False) == 0
    shown = capsys.readouterr().out
    assert "one serves demo" in shown
    assert "problem: expert-0 is lost" in shown


@pytest.mark.needs("redis")
@pytest.mark.parametrize("value", [b"{", b"\xff", b"[]", b'{"cluster":1}'])
def test_a_status_of_another_release_is_an_answer(
    redis: RedisServer, settings: Settings, capsys: pytest.CaptureFixture[str], value: bytes
) -> None:
    async def write() -> None:
        async with RedisStore(redis.url, namespace="one") as store:
            await store.compare_and_set(STATUS_KEY, value, expected=0)

    asyncio.run(write())
    assert status_command.run(settings.model_copy(update={"store": SecretStr(redis.url)}), as_json=False) == 1
    assert (
        "one: the store's status/cluster cannot be read, run all of the cluster from one release"
        in capsys.readouterr().out
    )


def test_who_was_left_out_is_shown_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    status = msgspec.structs.replace(_status(10.0, 0), left_out=(LeftOut(worker="expert-1", reason="no room"),))
    print_status(status, {}, None, age_s=0.0)
    assert "left out: expert-1: no room" in capsys.readouterr().out
    assert json.loads(as_text(status, {}, None))["left_out"] == [{"worker": "expert-1", "reason": "no room"}]


def test_an_old_status_is_shown_with_its_age(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(_status(10.0, 0), {}, None, age_s=STALE_S - 0.1)
    assert "s old" not in capsys.readouterr().out
    print_status(_status(10.0, 0), {}, None, age_s=STALE_S + 0.1)
    assert "this is 5 s old: the controller does not write" in capsys.readouterr().out
