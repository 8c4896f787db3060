"""Links between real processes: whole messages, deadlines, and peers that die, hang or never come."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch

from cluster.errors import ConfigError, PeerLostError, PeerRefusedError
from tests.support.eventually import wait_until
from tests.support.signals import send
from workers.experts.exchange import GlooLink, LinkClient, LinkServer, Meeting
from workers.experts.frame import FRAME_BYTES, TensorSpec

DEADLINE_S = 30.0
FOREVER_S = 3600.0
START_S = 120.0  # of another process
AT_ONCE_S = 10.0  # on a machine that has much else to do


def run_echo(pipe: Connection) -> None:
    """A peer that sends back what it gets, three numbers at a time."""
    links = LinkServer("127.0.0.1", DEADLINE_S)
    pipe.send("ready")

    def echo(meeting: Meeting) -> None:
        link = meeting.link()
        with contextlib.suppress(PeerLostError):
            while True:
                link.send(link.recv([TensorSpec((3,))], DEADLINE_S), DEADLINE_S)

    def serve(meeting: Meeting) -> None:
        echo(meeting)
        pipe.send(meeting.name)

    while True:
        meeting = links.meet(*pipe.recv())
        pipe.send(meeting.address())
        threading.Thread(target=serve, args=(meeting,), daemon=True).start()


class Echo:
    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=run_echo, args=(there,), daemon=True)
        self.process.start()
        assert self.pipe.poll(START_S)
        self.pipe.recv()

    def link(self) -> GlooLink:
        link_id = uuid.uuid4().hex
        return LinkClient("127.0.0.1", DEADLINE_S).connect(link_id, lambda address: self.introduce(link_id, address))

    def introduce(self, link_id: str, address: bytes) -> bytes:
        self.pipe.send((link_id, address))
        assert self.pipe.poll(DEADLINE_S)
        return bytes(self.pipe.recv())

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        send(self.process.pid, number)


@pytest.fixture
def echo() -> Iterator[Echo]:
    found = Echo()
    yield found
    found.process.kill()
    found.process.join()


def ask(link: GlooLink, deadline_s: float = DEADLINE_S) -> torch.Tensor:
    link.send([torch.arange(3.0)], deadline_s)
    return link.recv([TensorSpec((3,))], deadline_s)[0]


@pytest.mark.parametrize(
    ("number", "deadline_s"), [(signal.SIGKILL, FOREVER_S), (signal.SIGSTOP, 1.0)], ids=["dead", "hung"]
)
def test_a_peer_that_dies_is_an_error_at_once_and_a_hung_one_at_the_deadline(
    echo: Echo, number: signal.Signals, deadline_s: float
) -> None:
    links = [echo.link(), echo.link()]
    for link in links:
        assert ask(link).tolist() == [0.0, 1.0, 2.0]
    echo.signal(number)
    for link in links:
        started = time.monotonic()
        with pytest.raises(PeerLostError, match=link.name):
            ask(link, deadline_s)
        assert time.monotonic() - started < AT_ONCE_S
        with pytest.raises(PeerLostError, match="is broken"):
            link.send([torch.ones(1)], 1.0)


def test_one_link_closed_leaves_the_others(echo: Echo) -> None:
    first, second = echo.link(), echo.link()
    ask(first)
    first.close()
    assert echo.pipe.poll(AT_ONCE_S), "the peer still waits for what will never come"
    assert echo.pipe.recv() == first.name
    assert ask(second).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
def test_a_peer_that_dies_or_hangs_before_it_came_is_an_error_in_time(echo: Echo, number: signal.Signals) -> None:
    def exchange(address: bytes) -> bytes:
        theirs = echo.introduce("a", gone_address())
        echo.signal(number)
        return theirs

    before = threading.active_count()
    started = time.monotonic()
    with pytest.raises(PeerLostError):  # where it listened already, its system may still take the connection
        ask(LinkClient("127.0.0.1", 0.5).connect("a", exchange), 0.5)
    assert time.monotonic() - started < AT_ONCE_S
    wait_until(lambda: threading.active_count() <= before, threading.enumerate)


def test_an_exchange_that_fails_is_what_the_caller_hears_and_leaves_no_thread() -> None:
    def exchange(address: bytes) -> bytes:
        raise PeerRefusedError("not with you")

    before = threading.active_count()
    with pytest.raises(PeerRefusedError, match="not with you"):
        LinkClient("127.0.0.1", DEADLINE_S).connect("a", exchange)
    wait_until(lambda: threading.active_count() <= before, threading.enumerate)


def test_a_peer_that_is_gone_by_the_time_holds_nobody_up() -> None:
    server = LinkServer("127.0.0.1", AT_ONCE_S)
    nobody = gone_address()

    def wait() -> None:
        with pytest.raises(PeerLostError):
            server.meet("nobody", nobody).link()

    waits = threading.Thread(target=wait)
    waits.start()
    here, there = open_pair(server)
    here.send([], DEADLINE_S)
    waits.join(DEADLINE_S)
    assert not waits.is_alive()
    there.close()
    started = time.monotonic()
    with pytest.raises(PeerLostError, match="rendezvous"):
        LinkServer("127.0.0.1", 1.0).meet("nobody else", nobody).link()
    assert time.monotonic() - started < AT_ONCE_S


def gone_address() -> bytes:
    """Of a peer that is there no more."""
    found: list[bytes] = []

    def exchange(address: bytes) -> bytes:
        found.append(address)
        raise PeerLostError("it goes")

    with pytest.raises(PeerLostError, match="it goes"):
        LinkClient("127.0.0.1", DEADLINE_S).connect("gone", exchange)
    return found[0]


def open_pair(server: LinkServer, name: str = "p", tensor_host: str = "127.0.0.1") -> tuple[GlooLink, GlooLink]:
    meetings: list[Meeting] = []

    def exchange(address: bytes) -> bytes:
        meetings.append(server.meet(name, address))
        return meetings[0].address()

    link = LinkClient(tensor_host, DEADLINE_S).connect(name, exchange)
    return link, meetings[0].link()


WAITS: dict[str, Callable[[GlooLink], object]] = {
    "recv": lambda link: link.recv([TensorSpec((3,))], FOREVER_S),
    "rest": lambda link: link.recv([TensorSpec((FRAME_BYTES,), torch.uint8)], FOREVER_S),
    "send": lambda link: [link.send([torch.ones(FRAME_BYTES)], FOREVER_S) for _ in range(2)],
}


class Using:
    """A thread that uses a link until that breaks."""

    def __init__(self, use: Callable[[], object]) -> None:
        self._errors: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=lambda: self._errors.put(fails(use)), daemon=True)
        self._thread.start()

    def until_it_waits(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self._thread.ident is None or self._function() not in ("send", "recv"):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def _function(self) -> str:
        """Where it is: gloo's waits are no functions of Python's."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "" if frame is None else frame.f_code.co_name

    def error(self) -> str:
        return self._errors.get(timeout=DEADLINE_S)


def fails(use: Callable[[], object]) -> str:
    """What the `PeerLostError` says with which it ends."""
    with pytest.raises(PeerLostError) as caught:
        use()
    return caught.value.message


@pytest.mark.parametrize("waiting", WAITS)
def test_a_link_closed_by_another_thread_ends_the_waits_of_both_sides_at_once(waiting: str) -> None:
    link, other = open_pair(LinkServer("127.0.0.1", DEADLINE_S))
    if waiting == "rest":  # of a message that has begun
        other.send([torch.ones(1), torch.ones(1)], DEADLINE_S)
        link.recv([TensorSpec((1,))], DEADLINE_S)
    here, there = Using(lambda: WAITS[waiting](link)), Using(lambda: WAITS["recv"](other))
    here.until_it_waits()
    link.close()
    assert here.error() == "the link 'p' broke: closed on this side"
    assert there.error().startswith("the link 'p' broke: the peer sent nothing: ")
    link.close()
    for use in WAITS.values():
        assert fails(functools.partial(use, link)) == "the link 'p' is broken: closed on this side"


def play(link: GlooLink, is_first: bool, rounds: threading.Semaphore) -> None:
    """Send three numbers there and back, without end."""
    if is_first:
        link.send([torch.arange(3.0)], FOREVER_S)
    while True:
        assert link.recv([TensorSpec((3,))], FOREVER_S)[0].tolist() == [0.0, 1.0, 2.0]
        rounds.release()
        link.send([torch.arange(3.0)], FOREVER_S)


def test_links_closed_in_the_middle_of_their_work_end_it_with_an_error_and_nothing_else() -> None:
    server = LinkServer("127.0.0.1", DEADLINE_S)
    for number in range(20):
        link, other = open_pair(server, f"p{number}")
        rounds = threading.Semaphore(0)
        players = [Using(functools.partial(play, of, of is link, rounds)) for of in (link, other)]
        for _ in range(number):
            assert rounds.acquire(timeout=DEADLINE_S)
        closers = [threading.Thread(target=link.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        here, _ = [player.error() for player in players]
        assert here.endswith("closed on this side")
        for closer in closers:
            closer.join(DEADLINE_S)


def test_what_was_received_stays_while_the_next_message_is_under_way_and_until_it_is_taken() -> None:
    link, other = open_pair(LinkServer("127.0.0.1", DEADLINE_S))
    link.send([torch.full((3,), 1.0), torch.full((4,), 1.0)], DEADLINE_S)
    first = other.recv([TensorSpec((3,))], DEADLINE_S)
    link.send([torch.full((3,), 2.0)], DEADLINE_S)  # it has arrived, in other room
    first += other.recv([TensorSpec((4,))], DEADLINE_S)
    assert torch.cat(first).tolist() == [1.0] * 7
    assert other.recv([TensorSpec((3,))], DEADLINE_S)[0].tolist() == [2.0] * 3


def test_messages_arrive_whole_and_in_order() -> None:
    link, other = open_pair(LinkServer("127.0.0.1", DEADLINE_S))
    large = torch.randn(FRAME_BYTES // 4, 2)
    sent = [torch.arange(3), torch.empty(0, 4), large, torch.randn(5, 7), large + 1]

    def send_twice() -> None:
        for number in (1, 2):
            link.send([tensor * number for tensor in sent], DEADLINE_S)

    sender = threading.Thread(target=send_twice)
    sender.start()
    specs = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in sent]
    for number in (1, 2):
        got = other.recv(specs[:1], DEADLINE_S) + other.recv(specs[1:], DEADLINE_S)
        assert all(torch.equal(a * number, b) for a, b in zip(sent, got, strict=True))
    sender.join(DEADLINE_S)


@pytest.mark.needs("linux")
def test_everything_listens_on_the_tensor_host_alone() -> None:
    before = listening()
    server = LinkServer("127.0.0.2", DEADLINE_S)
    assert listening() == before  # nothing, until a link is asked for
    link, other = open_pair(server, tensor_host="127.0.0.3")
    assert {host for host, _ in listening() - before} == {"127.0.0.2", "127.0.0.3"}
    link.close()
    other.close()


def listening() -> set[tuple[str, int]]:
    """Where this process accepts TCP connections: host and inode."""
    inodes = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix("socket:[").removesuffix("]"))
    found = set()
    for family in ("tcp", "tcp6"):
        with open(f"/proc/net/{family}") as table:
            for line in list(table)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    address = bytes.fromhex(fields[1].split(":")[0])
                    found.add((".".join(str(byte) for byte in reversed(address)), int(fields[9])))
    return found


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tensor_host '203\.0\.113\.7'"):
        LinkServer("203.0.113.7", 1.0)
