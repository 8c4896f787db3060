"""One kill: what is streamed, when it strikes, for how long streams are sent again, and what is compared after."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from aiohttp import web

from cluster.protocol import EngineState
from cluster.store.records import ClusterStatus, WorkerStatus
from loadtests.cluster_process import LocalCluster
from loadtests.faults import Kind, Look, Stroke
from loadtests.kill_round import (
    Disturbance,
    Request,
    compared,
    long_request,
    pages_in_use,
    pauses,
    requests,
    undisturbed,
)
from loadtests.processes import BenchError
from loadtests.token_streams import Difference, Sample, TokenStream

DEADLINE_S = 60.0
NUM_TOKENS = 24
WORDS = list(range(100, 300))


def test_requests_are_seeded() -> None:
    first, again, other = (requests(random.Random(seed), WORDS, "m", (48, 80)) for seed in (1, 1, 2))
    assert first == again != other


def test_requests_have_what_must_survive() -> None:
    asked = requests(random.Random(1), WORDS, "m", (48, 80))
    bodies = [request.body for request in asked]
    assert all(isinstance(body["seed"], int) and body["ignore_eos"] for body in bodies)
    assert any(body.get("temperature") == 0.0 for body in bodies)
    assert any(body.get("temperature", 0.0) > 0 for body in bodies)
    assert any(body.get("n") == 2 for body in bodies)
    assert any(body.get("stop") and 0 < body["min_tokens"] < body["max_tokens"] for body in bodies)
    (chat,) = [request for request in asked if request.path == "/v1/chat/completions"]
    assert chat.body["logprobs"]
    assert [request.num_tokens // request.body["max_tokens"] for request in asked] == [1, 1, 2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_a_long_request_fills_the_context(seed: int) -> None:
    request = long_request(random.Random(seed), WORDS, "m", (48, 80), 4096)
    assert 48 <= request.num_tokens <= 80
    assert len(request.body["prompt"]) + request.num_tokens == 4096
    assert request == long_request(random.Random(seed), WORDS, "m", (48, 80), 4096)


# ------------------------------------------------------------------------------------------------------ a disturbance


@dataclass
class Gateway:
    """Tokens 0, 1, 2 …; behind token `NUM_TOKENS / 2` it waits where it `holds`."""

    holds: threading.Event = field(default_factory=threading.Event)  # set: nothing is waited for
    status: int = 200
    cuts: int = 0  # so many of the next streams it breaks off in their middle
    url: str = ""
    num_asked: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.num_asked += 1
        if self.status != 200:
            return web.Response(status=self.status, text="no")
        response = web.StreamResponse()
        await response.prepare(request)
        for index in range(NUM_TOKENS):
            if index == NUM_TOKENS // 2:
                await asyncio.to_thread(self.holds.wait, DEADLINE_S)
                if self.cuts:
                    self.cuts -= 1
                    assert request.transport is not None
                    request.transport.abort()
                    return response
            reason = "length" if index == NUM_TOKENS - 1 else None
            event = {"choices": [{"text": "w", "token_ids": [index], "finish_reason": reason}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await ended.wait()
        await runner.cleanup()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    served, ready, ended, loop = Gateway(), threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(served.serve(ready, ended),))
    thread.start()
    assert ready.wait(DEADLINE_S)
    yield served
    served.holds.set()
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()


LOOK = Look(at_s=1.0, epoch=1, children={"redis": 1}, workers={"expert-0": 2}, num_resumed=0)


@dataclass(frozen=True)
class Fault(Kind):
    """Lets the gateway go on when it strikes, and is over once `num_asked` requests have come; -1: it never is."""

    num_asked: int = 0
    finds_anybody: bool = True
    lets_go: bool = True

    def choose(self, cluster: LocalCluster, before: Look, rng: random.Random) -> str | None:
        return "it" if self.finds_anybody else None

    def strike(self, before: Look, name: str) -> Stroke:
        if self.lets_go:
            GATEWAYS[0].holds.set()
        return Stroke(name, 0.0, 0.0, is_delivered=True)

    def wait_over(self, cluster: LocalCluster, before: Look, stroke: Stroke) -> tuple[Look, float]:
        condition = threading.Event()
        while GATEWAYS[0].num_asked < self.num_asked:
            condition.wait(0.01)
        if self.num_asked < 0:
            raise BenchError("it does not get whole")
        return before, 4.0


GATEWAYS: list[Gateway] = []  # the one that a `Fault` knows


@pytest.fixture(autouse=True)
def known(gateway: Gateway) -> Iterator[None]:
    GATEWAYS[:] = [gateway]
    yield
    GATEWAYS.clear()


ASKED = [Request("/v1/completions", {"max_tokens": NUM_TOKENS})] * 2


def _disturb(fault: Fault, at_tokens: int) -> tuple[Disturbance, tuple[Look, float] | None]:
    async def run() -> tuple[Disturbance, tuple[Look, float] | None]:
        cluster = cast(LocalCluster, GATEWAYS[0])
        disturbance = Disturbance(cluster, fault, LOOK, random.Random(0), at_tokens)
        return disturbance, await disturbance.run(ASKED)

    return asyncio.run(run())


def _fault(**given: Any) -> Fault:
    return Fault("fault", "expert", signal.SIGKILL, **{"may_pause": True, **given})


@pytest.mark.parametrize("at_tokens", [0, 1, NUM_TOKENS])
def test_it_strikes_in_mid_stream(at_tokens: int) -> None:
    """The streams would not end otherwise."""
    disturbance, over = _disturb(_fault(), at_tokens)
    assert over == (LOOK, 4.0)
    assert disturbance.stroke is not None
    assert [[stream.ids for stream in again] for again in disturbance.streams] == [[list(range(NUM_TOKENS))]] * 2


def test_where_no_stream_may_pause_they_are_sent_again_until_it_is_over() -> None:
    disturbance, over = _disturb(_fault(may_pause=False, num_asked=8), 1)
    assert over is not None
    assert sum(map(len, disturbance.streams)) >= 8
    assert all(stream.ids == list(range(NUM_TOKENS)) for again in disturbance.streams for stream in again)


def test_streams_that_are_over_before_anybody_is_found_are_struck_by_nothing(gateway: Gateway) -> None:
    gateway.holds.set()
    disturbance, over = _disturb(_fault(finds_anybody=False), 1)
    assert over is None
    assert disturbance.stroke is None
    assert [len(again) for again in disturbance.streams] == [1, 1]


@pytest.mark.parametrize("lets_go", [True, False])
def test_a_cluster_that_does_not_get_whole_is_an_error_at_once(lets_go: bool) -> None:
    """Even where the streams hang."""
    with pytest.raises(BenchError, match="it does not get whole"):
        _disturb(_fault(may_pause=False, num_asked=-1, lets_go=lets_go), 1)


def test_a_request_that_fails_is_not_sent_again(gateway: Gateway) -> None:
    gateway.status = 503
    disturbance, _ = _disturb(_fault(may_pause=False), 0)
    assert [len(again) for again in disturbance.streams] == [1, 1]
    done = compared(disturbance.streams, [_sampled([1, 2]), _sampled([1, 2])])
    assert (done.failed, done.difference.lost) == (2, 4)
    assert "HTTP 503" in done.first_error


@pytest.mark.parametrize(("cuts", "cut", "failed"), [(2, 2, 0), (3, 2, 1)])
def test_where_a_fault_breaks_streams_each_is_sent_once_more_when_it_is_over(
    gateway: Gateway, cuts: int, cut: int, failed: int
) -> None:
    gateway.cuts = cuts
    disturbance, over = _disturb(_fault(breaks_streams=True), 1)
    assert over is not None
    assert [len(again) for again in disturbance.streams] == [2, 2]
    expected = TokenStream([Sample(list(range(NUM_TOKENS)), text="w" * NUM_TOKENS, finish_reason="length")])
    done = compared(disturbance.streams, [expected] * 2, breaks_streams=True)
    assert (done.cut, done.failed, done.difference.lost) == (cut, failed, failed * NUM_TOKENS // 2)
    assert done.difference.repeated == done.difference.differing == 0
    assert compared(disturbance.streams, [expected] * 2).failed == cuts  # nothing of another fault's is forgiven


def test_without_an_undisturbed_run_there_is_nothing_to_compare_with(gateway: Gateway) -> None:
    gateway.holds.set()
    streams = asyncio.run(undisturbed(gateway.url, ASKED))
    assert [stream.ids for stream in streams] == [list(range(NUM_TOKENS))] * 2
    gateway.status = 503
    with pytest.raises(BenchError, match="an undisturbed request failed: HTTP 503"):
        asyncio.run(undisturbed(gateway.url, ASKED))


# ---------------------------------------------------------------------------------------------------- what came of it


def _sampled(ids: list[int], *times_s: float, sent_s: float = 0.0) -> TokenStream:
    sample = Sample(ids, times_s=list(times_s), text="a", finish_reason="length")
    return TokenStream(samples=[sample], sent_s=sent_s, is_done=True)


def test_every_stream_of_a_request_is_compared_with_its_undisturbed_one() -> None:
    again = [_sampled([1, 2]), _sampled([1]), _sampled([1, 2])]
    assert compared([again, [_sampled([3])]], [_sampled([1, 2]), _sampled([3])]).difference == Difference(7, lost=1)


def test_the_pause_of_a_kill_is_the_longest_of_all_streams() -> None:
    expected = [_sampled([], 1.0, 1.2, 1.4), _sampled([], 0.4, 1.0, 1.5)]
    quick = _sampled([], 101.0, 101.1, 101.2, sent_s=100.0)
    paused = _sampled([], 100.5, 103.5, 103.6, sent_s=100.0)
    longest, undisturbed_s = pauses([[quick], [paused]], expected, at_s=101.05)
    assert longest == pytest.approx(3.0)
    assert undisturbed_s == pytest.approx(0.5)  # since 1.05 s after the sending, too


def _status(*states: EngineState, at_s: float = 100.0) -> ClusterStatus:
    workers = tuple(
        WorkerStatus(
            name=f"attention-{i}",
            role="attention",
            node_id="n",
            address="",
            pid=1,
            condition="serving",
            state=state,
        )
        for i, state in enumerate(states)
    )
    return ClusterStatus(
        cluster="c", model="m", epoch=1, controller_id="i", at_s=at_s, num_layers=1, num_experts=1, workers=workers
    )


IDLE = EngineState(pages_total=16, pages_free=16)
LEAKY = EngineState(pages_total=16, pages_free=13)


@pytest.mark.parametrize(
    ("status", "in_use"),
    [
        (_status(IDLE, IDLE), 0),
        (_status(IDLE, LEAKY), 3),
        (_status(LEAKY, LEAKY), 6),
        (_status(IDLE), None),  # the other one has not reported
        (_status(IDLE, EngineState()), None),
        (_status(IDLE, IDLE, at_s=90.5), None),  # from before the last stream's end was known
        (None, None),
    ],
)
def test_pages_in_use_are_counted_of_every_attention_worker(status: ClusterStatus | None, in_use: int | None) -> None:
    assert pages_in_use(status, num_workers=2, idle_since_s=90.0) == in_use
