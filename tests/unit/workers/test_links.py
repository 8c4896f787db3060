"""Offering links and asking for them, without tensors."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from cluster.errors import PeerLostError, PeerRefusedError
from cluster.protocol import LINK_METHOD, SERVICE, Launch, Likeness, LinkOffer, OpenLink, Peer
from tests.support.eventually import eventually
from tests.support.worker_process import DEADLINE_S, bearer
from workers.auth import TokenCheck, VersionCheck
from workers.experts.exchange import LinkClient
from workers.links import MAX_PENDING_LINKS, ExpertService, link_opener

LIKENESS = Likeness(checkpoint="abc", dtype="float32", numerics="invariant", arithmetic="host kernels 1")


class FakeLink:
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeLinks:
    """Peers come when the test says so."""

    come: threading.Event = field(default_factory=threading.Event)
    links: dict[str, FakeLink] = field(default_factory=dict)
    failure: Exception | None = None

    cannot_listen: bool = False

    def meet(self, link_id: str, address: bytes) -> FakeMeeting:
        return FakeMeeting(self, link_id, address)


class FakeMeeting:
    def __init__(self, links: FakeLinks, link_id: str, theirs: bytes) -> None:
        self._links, self._link_id, self._theirs = links, link_id, theirs

    def address(self) -> bytes:
        if self._links.cannot_listen:
            raise PeerLostError("it cannot listen")
        return b"here, for " + self._theirs

    def link(self) -> FakeLink:
        assert self._links.come.wait(DEADLINE_S)
        if self._links.failure is not None:
            raise self._links.failure
        self._links.links[self._link_id] = FakeLink()
        return self._links.links[self._link_id]


@dataclass
class FakeHost:
    """Serves until the test says stop."""

    stop: threading.Event = field(default_factory=threading.Event)
    serving: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def serve(self, link: FakeLink) -> None:
        self.serving.set()
        assert self.stop.wait(DEADLINE_S)
        if self.failure is not None:
            raise self.failure


@dataclass
class Served:
    address: str
    service: ExpertService
    links: FakeLinks
    host: FakeHost

    async def until(self, condition: Callable[[], bool]) -> None:
        await eventually(condition)


@contextlib.asynccontextmanager
async def serving(token: str | None = None, likeness: Likeness = LIKENESS) -> AsyncIterator[Served]:
    fakes: tuple[Any, Any] = (FakeHost(), FakeLinks())
    service = ExpertService(fakes[0], likeness, fakes[1], worker_id="me")
    checks: list[grpc.aio.ServerInterceptor] = [TokenCheck(token)] if token else []
    server = grpc.aio.server(interceptors=[*checks, VersionCheck("expert-0")])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, service.handlers()),))
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/e.sock"
        server.add_insecure_port(address)
        await server.start()
        try:
            yield Served(address, service, fakes[1], fakes[0])
        finally:
            fakes[1].come.set()
            fakes[0].stop.set()
            await server.stop(None)


async def ask(served: Served, body: bytes | None = None, token: str | None = None, **request: Any) -> LinkOffer:
    asked = {"link_id": "a", "from_name": "attention-0", "address": b"there"} | request
    message = OpenLink(likeness=LIKENESS, **asked)
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.unary_unary(LINK_METHOD)
        answer = await call(body or msgspec.msgpack.encode(message), timeout=DEADLINE_S, metadata=bearer(token))
    return msgspec.msgpack.decode(answer, type=LinkOffer)


async def refused(served: Served, body: bytes | None = None, **request: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(served, body, **request)
    return caught.value.code()


def test_a_link_is_offered_served_and_closed() -> None:
    async def run() -> None:
        async with serving() as served:
            assert served.service.idle
            assert await ask(served, worker_id="me") == LinkOffer(address=b"here, for there")
            assert not served.service.idle
            served.links.come.set()
            await served.until(served.host.serving.is_set)
            assert not served.service.idle
            served.host.stop.set()
            await served.until(lambda: served.service.idle)
            assert served.links.links["a"].is_closed

    asyncio.run(run())


def test_what_is_no_request_for_this_worker_is_refused() -> None:
    async def run() -> None:
        async with serving() as served:
            assert await refused(served, b"\xc1") == grpc.StatusCode.INVALID_ARGUMENT
            assert await refused(served, link_id="") == grpc.StatusCode.INVALID_ARGUMENT
            assert await refused(served, link_id="x" * 1000) == grpc.StatusCode.INVALID_ARGUMENT
            assert await refused(served, address=b"") == grpc.StatusCode.INVALID_ARGUMENT
            assert await refused(served, address=b"x" * 5000) == grpc.StatusCode.INVALID_ARGUMENT
            assert await refused(served, worker_id="before me") == grpc.StatusCode.NOT_FOUND
            served.service.drain()
            assert await refused(served) == grpc.StatusCode.UNAVAILABLE
            assert served.service.idle

    asyncio.run(run())


def test_a_worker_that_cannot_listen_says_so_to_who_asked() -> None:
    async def run() -> None:
        async with serving() as served:
            served.links.cannot_listen = True
            served.links.failure = PeerLostError("it cannot listen")
            served.links.come.set()
            assert await refused(served) == grpc.StatusCode.INTERNAL
            await served.until(lambda: served.service.idle)

    asyncio.run(run())


def test_links_that_wait_for_their_peers_are_bounded_and_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving() as served:
            for number in range(MAX_PENDING_LINKS):
                await ask(served, link_id=str(number))
            assert await refused(served) == grpc.StatusCode.RESOURCE_EXHAUSTED
            served.links.failure = PeerLostError("nobody came")
            served.links.come.set()
            await served.until(lambda: served.service.idle)
            await ask(served)  # there is room again

    asyncio.run(run())
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines[:MAX_PENDING_LINKS] == ["the link from 'attention-0' ends: nobody came"] * MAX_PENDING_LINKS


@pytest.mark.parametrize(
    ("failure", "line"),
    [(PeerLostError("it went"), "ends: it went"), (ZeroDivisionError("a fault"), "ends: ZeroDivisionError: a fault")],
)
def test_a_link_that_fails_says_so_once_and_ends_alone(
    failure: Exception, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with serving() as served:
            served.host.failure = failure
            served.links.come.set()
            served.host.stop.set()
            await ask(served)
            await served.until(lambda: served.service.idle)
            assert served.links.links["a"].is_closed
            await ask(served, link_id="b")
            await served.until(lambda: "b" in served.links.links and served.service.idle)

    asyncio.run(run())
    lines = [record.getMessage() for record in caplog.records if record.levelno >= 30]
    assert lines == [f"the link from 'attention-0' {line}"] * 2


def opener(token: str | None = None, likeness: Likeness = LIKENESS) -> Callable[[Peer], Any]:
    launch = Launch(
        address="",
        model_path="",
        served_name="",
        name="attention-7",
        token=token,
        tensor_host="127.0.0.1",
        peer_timeout_s=5,
    )
    return link_opener(launch, likeness)


def test_an_attention_worker_asks_for_a_link_and_meets_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[tuple[Any, ...]] = []
    met: list[tuple[Any, ...]] = []
    monkeypatch.setattr(LinkClient, "__init__", lambda _, *values: clients.append(values))

    def connect(_: LinkClient, link_id: str, exchange: Callable[[bytes], bytes]) -> str:
        met.append((link_id, exchange(b"there")))
        return "a link"

    monkeypatch.setattr(LinkClient, "connect", connect)

    async def run() -> None:
        async with serving(token="s3cret") as served:
            peer = Peer(name="expert-0", worker_id="me", address=served.address)
            assert await asyncio.to_thread(opener("s3cret"), peer) == "a link"
            served.links.come.set()
            served.host.stop.set()
            await served.until(lambda: served.service.idle)
            ((link_id, address),) = met
            assert (address, clients) == (b"here, for there", [("127.0.0.1", 5)])
            assert list(served.links.links) == [link_id]  # both have the same name for it
            assert len(link_id) >= 32

    asyncio.run(run())


def test_a_peer_that_gives_no_link_is_lost() -> None:
    async def run() -> None:
        async with serving(token="s3cret") as served:
            for peer, token, text in (
                (Peer(name="expert-0", worker_id="another", address=served.address), "s3cret", "another is not here"),
                (Peer(name="expert-0", worker_id="me", address=served.address), "wrong", "no valid token"),
                (Peer(name="expert-0", worker_id="me", address="unix:/nowhere"), "s3cret", "expert-0 at unix:/nowhere"),
            ):
                with pytest.raises(PeerLostError, match=text) as caught:
                    await asyncio.to_thread(opener(token), peer)
                assert isinstance(caught.value, PeerRefusedError) == (token == "wrong")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("field", "value", "numerics", "is_refused"),
    [
        ("checkpoint", "xyz", "fast", True),
        ("dtype", "bfloat16", "fast", True),
        ("numerics", "fast", "invariant", True),
        ("arithmetic", "host kernels 2", "invariant", True),
        ("arithmetic", "host kernels 2", "fast", False),
    ],
)
def test_who_would_compute_something_else_gets_no_link_and_hears_what_differs(
    field: str, value: str, numerics: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkClient, "connect", lambda _, __, exchange: exchange(b"there") and "a link")
    ours = msgspec.structs.replace(LIKENESS, numerics=numerics)
    theirs = msgspec.structs.replace(ours, **{field: value})

    async def run() -> None:
        async with serving(likeness=ours) as served:
            peer = Peer(name="expert-0", worker_id="me", address=served.address)
            if not is_refused:
                assert await asyncio.to_thread(opener(likeness=theirs), peer) == "a link"
                return
            with pytest.raises(PeerRefusedError) as caught:
                await asyncio.to_thread(opener(likeness=theirs), peer)
            assert "expert-0 at" in caught.value.message
            assert f"attention-7 has {field} {value!r} instead of {getattr(ours, field)!r}" in caught.value.message
            assert served.service.idle

    asyncio.run(run())
