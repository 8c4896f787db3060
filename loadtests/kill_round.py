"""One kill of `loadtests/kill.py`: the same requests undisturbed and disturbed, compared; then pages are counted."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from cluster.store.records import ClusterStatus
from loadtests.cluster_process import LocalCluster
from loadtests.faults import WHOLE_S, Kind, Look, Stroke, look
from loadtests.processes import BenchError
from loadtests.token_streams import Difference, TokenStream, compare_cut, compare_streams, read_stream
from loadtests.workload import random_prompts

STREAM_S = 180.0  # one stream, its pauses included
EARLY_SHARE = 0.2  # of the kills, before the first token:
SENT_S = 0.005  # so long after the requests were sent
POLL_S = 0.05
MIN_AFTER = 8  # events: what comes right after a signal may have been on its way
PAGES_S = 10.0  # after the last stream's end, until its pages are free
STATUS_S = 1.0  # a status that is so much younger than an event knows of it
QUESTIONS = ("What is a river?", "Why do birds sing?", "Tell me about the sea.", "Who builds a house?")
STOPS = [".", "!", "?"]  # some answer of the demo model has one of them soon


@dataclass(frozen=True)
class Request:
    """What is streamed."""

    path: str  # "/v1/completions", "/v1/chat/completions"
    body: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """That it generates at most."""
        return int(self.body["max_tokens"]) * int(self.body.get("n", 1))


@dataclass
class Round:
    """What one fault did."""

    difference: Difference = field(default_factory=Difference)
    failed: int = 0  # requests
    cut: int = 0  # requests whose stream was cut off, as is promised of the fault
    first_error: str = ""
    pages_leaked: int = 0
    missed: str = ""  # why it is no kill: it struck nothing
    pause_s: float = 0.0
    undisturbed_s: float = 0.0  # the same, without the fault
    whole_s: float = 0.0  # from the signal until the cluster is whole again


def requests(rng: random.Random, words: Sequence[int], model: str, output_tokens: tuple[int, int]) -> list[Request]:
    """What must survive: greedy, a seeded temperature, two choices of a prompt, a chat with logprobs, stop strings."""
    greedy, two, stopping = random_prompts(words, [rng.randint(8, 160) for _ in range(3)], rng.randrange(2**31))

    def request(path: str, **body: Any) -> Request:
        given = {"model": model, "seed": rng.randrange(2**31), "max_tokens": rng.randint(*output_tokens)}
        return Request(path, given | {"ignore_eos": True} | body)

    least = output_tokens[0] * 2 // 3
    chat = [{"role": "user", "content": rng.choice(QUESTIONS)}]
    return [
        request("/v1/completions", prompt=greedy, temperature=0.0),
        request("/v1/chat/completions", messages=chat, temperature=0.8, logprobs=True, top_logprobs=2),
        request("/v1/completions", prompt=two, temperature=0.9, top_p=0.95, n=2),
        request("/v1/completions", prompt=stopping, temperature=0.7, stop=STOPS, min_tokens=least),
    ]


def long_request(
    rng: random.Random, words: Sequence[int], model: str, output_tokens: tuple[int, int], context: int
) -> Request:
    """One whose prompt and answer are `context` tokens."""
    num_output = rng.randint(*output_tokens)
    (prompt,) = random_prompts(words, [context - num_output], rng.randrange(2**31))
    drawn = {"temperature": 0.8, "seed": rng.randrange(2**31)}
    body = {"model": model, "prompt": prompt, "max_tokens": num_output, "ignore_eos": True}
    return Request("/v1/completions", body | drawn)


async def undisturbed(url: str, asked: Sequence[Request]) -> list[TokenStream]:
    """Raises `BenchError` where one fails: then there is nothing to compare with."""
    streams = [TokenStream() for _ in asked]
    async with _session() as session:
        await asyncio.gather(*(_read(session, url, *pair) for pair in zip(asked, streams, strict=True)))
    if wrong := next((stream.error for stream in streams if stream.error), ""):
        raise BenchError(f"an undisturbed request failed: {wrong}")
    return streams


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))


async def _read(
    session: aiohttp.ClientSession,
    url: str,
    request: Request,
    stream: TokenStream,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> None:
    await read_stream(session, f"{url}{request.path}", request.body, stream, STREAM_S, on_tokens)


class Disturbance:
    """The same requests again, and a fault of one kind among them once `at_tokens` tokens have come."""

    def __init__(self, cluster: LocalCluster, kind: Kind, before: Look, rng: random.Random, at_tokens: int) -> None:
        self.streams: list[list[TokenStream]] = []  # of each request: one, or as many as its fault lasted for
        self.stroke: Stroke | None = None
        self._cluster = cluster
        self._kind = kind
        self._before = before
        self._rng = rng
        self._num_left = at_tokens
        self._moment = asyncio.Event()

    async def run(self, asked: Sequence[Request]) -> tuple[Look, float] | None:
        """Until the streams are over and the cluster is whole again: how it is then, and after how long it was.

        None where the streams were over before anybody could be struck. Raises `BenchError` where it does not get
        whole.
        """
        if self._num_left == 0:
            asyncio.get_running_loop().call_later(SENT_S, self._moment.set)
        striking = asyncio.create_task(self._strike())
        async with _session() as session:
            reading = asyncio.gather(*(self._stream(session, request, striking) for request in asked))
            both: set[asyncio.Future[Any]] = {reading, striking}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if striking.done() and striking.exception() is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                return await striking
            await reading
        if self.stroke is None and not striking.done():
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
            return None
        return await striking

    async def _stream(
        self, session: aiohttp.ClientSession, request: Request, striking: asyncio.Task[tuple[Look, float]]
    ) -> None:
        """Once, or again and again until the fault is over; one that the fault cut off once more after it."""
        again: list[TokenStream] = []
        self.streams.append(again)
        while True:
            again.append(TokenStream())
            await _read(session, self._cluster.url, request, again[-1], self._count)
            if self._kind.breaks_streams and again[-1].is_cut and len(again) == 1:
                await asyncio.wait({striking})
            elif self._kind.may_pause or striking.done() or again[-1].error:
                return

    def _count(self, num_tokens: int) -> None:
        self._num_left -= num_tokens
        if self._num_left <= 0:
            self._moment.set()

    async def _strike(self) -> tuple[Look, float]:
        await self._moment.wait()
        while (name := await asyncio.to_thread(self._kind.choose, self._cluster, self._before, self._rng)) is None:
            await asyncio.sleep(POLL_S)
        self.stroke = self._kind.strike(self._before, name)
        return await asyncio.to_thread(self._kind.wait_over, self._cluster, self._before, self.stroke)


async def one_round(
    cluster: LocalCluster,
    kind: Kind,
    rng: random.Random,
    words: Sequence[int],
    output_tokens: tuple[int, int],
) -> Round:
    """Undisturbed, disturbed, compared, and the pages counted. Raises `BenchError` where it cannot be measured."""
    if kind.is_long:
        asked = [long_request(rng, words, cluster.server.model, output_tokens, cluster.max_model_len)]
    else:
        asked = requests(rng, words, cluster.server.model, output_tokens)
    expected = await undisturbed(cluster.url, asked)
    before = await asyncio.to_thread(look, cluster)
    if before is None:
        raise BenchError("the status of a whole cluster cannot be read")
    at_tokens = 0 if rng.random() < EARLY_SHARE else rng.randint(1, sum(request.num_tokens for request in asked) // 4)
    disturbance = Disturbance(cluster, kind, before, rng, at_tokens)
    over = await disturbance.run(asked)
    ended_s = time.time()
    done = compared(disturbance.streams, expected, breaks_streams=kind.breaks_streams)
    stroke = disturbance.stroke
    if over is None or stroke is None:
        done.missed = "the streams were over before anybody could be struck"
    else:
        after, done.whole_s = over
        done.missed = kind.missed(before, after, stroke)
        done.pause_s, done.undisturbed_s = pauses(disturbance.streams, expected, stroke.at_s)
        if kind.breaks_streams and not done.missed and not done.cut:
            done.missed = "no stream was cut off"
        if not done.missed and not any(
            stream.error or stream.num_events(stroke.at_s) >= MIN_AFTER
            for streams in disturbance.streams
            for stream in streams
        ):
            done.missed = "the streams were over when the signal came"
    done.pages_leaked = await asyncio.to_thread(pages_leaked, cluster, ended_s)
    return done


def compared(
    streams: Sequence[Sequence[TokenStream]], expected: Sequence[TokenStream], *, breaks_streams: bool = False
) -> Round:
    """What each request's streams differ in from its undisturbed one.

    Where the fault breaks streams, one that was cut off and sent again is compared as far as it came.
    """
    done = Round()
    for again, one in zip(streams, expected, strict=True):
        for stream in again:
            if breaks_streams and stream.is_cut and stream is not again[-1]:
                done.cut += 1
                done.difference += compare_cut(stream, one)
                continue
            done.difference += compare_streams(stream, one)
            done.failed += bool(stream.error)
            done.first_error = done.first_error or stream.error
    return done


def pauses(
    streams: Sequence[Sequence[TokenStream]], expected: Sequence[TokenStream], at_s: float
) -> tuple[float, float]:
    """The longest pause of any stream from `at_s` on, and the undisturbed ones' from as long after the sending."""
    since_s = at_s - min(again[0].sent_s for again in streams)
    sent_s = min(stream.sent_s for stream in expected)
    longest = max(stream.pause_s(at_s) for again in streams for stream in again)
    return longest, max(stream.pause_s(sent_s + since_s) for stream in expected)


def pages_leaked(cluster: LocalCluster, idle_since_s: float) -> int:
    """KV pages that attention workers still have in use though nothing runs since `idle_since_s` (`time.time()`).

    Pages that only the prefix cache keeps count as free. Raises `BenchError` where no worker's numbers come.
    """
    deadline = time.monotonic() + WHOLE_S
    patience = time.monotonic() + PAGES_S
    while True:
        status = cluster.status()
        in_use = pages_in_use(status, cluster.settings.attention_workers, idle_since_s)
        if in_use == 0 or (in_use is not None and time.monotonic() > patience):
            return in_use
        if time.monotonic() > deadline:
            raise BenchError(f"after {WHOLE_S:g} s not every attention worker has said how many pages it has")
        time.sleep(POLL_S)


def pages_in_use(status: ClusterStatus | None, num_workers: int, idle_since_s: float) -> int | None:
    """None where that is not known of all attention workers as of later than `idle_since_s`."""
    if status is None or status.at_s < idle_since_s + STATUS_S:
        return None
    workers = [worker for worker in status.workers if worker.role == "attention" and worker.condition == "serving"]
    known = [worker.state for worker in workers if worker.state.pages_total > 0]
    return sum(state.pages_total - state.pages_free for state in known) if len(known) >= num_workers else None
