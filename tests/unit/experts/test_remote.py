"""Experts on other workers, as real processes: equal bits, and workers that die or hang."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch

from cluster.errors import PeerLostError
from cluster.protocol import Peer
from tests.support.experts import experts_of, in_moe_layers, make_host, make_route, take_shard
from tests.support.models import TINY, Driver, random_weights
from tests.support.numerics import numerics
from tests.support.signals import send
from workers.experts.backend import ExpertBackend, LocalExperts
from workers.experts.exchange import GlooLink, LinkClient, LinkServer, Meeting
from workers.experts.routed import RoutedExperts
from workers.models.decoder import Decoder

DEADLINE_S = 30.0
START_S = 120.0  # of other processes
ANSWER_S = 5.0
AT_ONCE_S = 10.0  # on a machine that has much else to do
ALL = tuple(range(8))
EVEN, ODD = (0, 2, 4, 6), (1, 3, 5, 7)
KINDS = [pytest.param("native", marks=pytest.mark.needs("compiler")), "blocks"]


def run_worker(pipe: Connection, ids: Sequence[int], kind: str) -> None:
    """An expert worker: says where it is, then serves a link for each id that it is told."""
    torch.set_num_threads(1)
    host = make_host(TINY, random_weights(TINY), numerics(kind), ids)
    links = LinkServer("127.0.0.1", DEADLINE_S)
    pipe.send("ready")

    def serve(meeting: Meeting) -> None:
        with contextlib.suppress(PeerLostError):
            host.serve(meeting.link())

    threads = []
    while (asked := pipe.recv()) is not None:
        meeting = links.meet(*asked)
        pipe.send(meeting.address())
        threads.append(threading.Thread(target=serve, args=(meeting,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(DEADLINE_S)


class Workers:
    """Expert workers by id, each a process."""

    def __init__(self) -> None:
        self._context = get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._lock = threading.Lock()
        self.processes = {}

    def start(self, held: dict[str, Sequence[int]], kind: str) -> None:
        for name, ids in held.items():
            self._pipes[name], there = self._context.Pipe()
            self.processes[name] = self._context.Process(target=run_worker, args=(there, ids, kind))
            self.processes[name].start()
        for name in held:
            assert self._pipes[name].poll(START_S)
            self._pipes[name].recv()

    def open_link(self, peer: Peer) -> GlooLink:
        link_id = uuid.uuid4().hex

        def exchange(address: bytes) -> bytes:
            pipe = self._pipes[peer.worker_id]
            with self._lock:
                pipe.send((link_id, address))
                if not pipe.poll(ANSWER_S):
                    raise PeerLostError(f"{peer.name} does not answer")
                return bytes(pipe.recv())

        return LinkClient("127.0.0.1", DEADLINE_S).connect(link_id, exchange)

    def signal(self, name: str, number: signal.Signals) -> None:
        pid = self.processes[name].pid
        assert pid is not None
        send(pid, number)
        if number == signal.SIGKILL:
            self.processes[name].join(DEADLINE_S)

    def end(self) -> list[int | None]:
        for pipe in self._pipes.values():
            pipe.send(None)
        for process in self.processes.values():
            process.join(DEADLINE_S)
        return [process.exitcode for process in self.processes.values()]


@pytest.fixture
def workers() -> Iterator[Workers]:
    found = Workers()
    yield found
    for process in found.processes.values():
        process.kill()
        process.join()


def driver(backend: ExpertBackend, kind: str) -> Driver:
    tokens = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return Driver(Decoder(TINY, random_weights(TINY), backend, numerics(kind)), [tokens])


def local_logits(kind: str) -> torch.Tensor:
    local = LocalExperts(experts_of(random_weights(TINY)), numerics(kind))
    return driver(local, kind).run([[(0, 30)], *[[(0, 1)]] * 10])[0]


def routed(
    workers: Workers,
    kind: str,
    own: Sequence[int] = (),
    timeout_s: float = DEADLINE_S,
    on_change: Callable[[], None] = lambda: None,
) -> RoutedExperts:
    shard = take_shard(experts_of(random_weights(TINY)), in_moe_layers(TINY, own))
    return RoutedExperts(TINY, numerics(kind), timeout_s, workers.open_link, shard, on_change)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [(), (0, 3, 4)], ids=["remote", "mixed"])
def test_logits_are_those_of_one_worker_bit_for_bit(workers: Workers, own: Sequence[int], kind: str) -> None:
    held = {"a": EVEN, "b": ODD}
    workers.start(held, kind)
    experts, other = routed(workers, kind, own), routed(workers, kind)  # two attention workers at once
    assert not experts.ready
    for backend in (experts, other):
        backend.set_route(make_route(1, TINY, held))
        assert backend.ready
    found: list[torch.Tensor] = []
    beside = threading.Thread(target=lambda: found.append(driver(other, kind).run([[(0, 30)], *[[(0, 1)]] * 10])[0]))
    beside.start()
    logits = driver(experts, kind).run([[(0, 30)], *[[(0, 1)]] * 10])[0]
    beside.join(DEADLINE_S)
    assert torch.equal(logits, local_logits(kind))
    assert torch.equal(found[0], logits)
    experts.close()
    other.close()
    assert workers.end() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_workers_change_nothing_with_a_replica_and_else_hold_the_step_up(workers: Workers, kind: str) -> None:
    held = {"a": EVEN, "b": ODD, "c": (0, 1, 2, 4, 6)}
    workers.start(held, kind)
    changes: list[bool] = []
    experts = routed(workers, kind, on_change=lambda: changes.append(experts.ready))
    experts.set_route(make_route(1, TINY, held))
    run = driver(experts, kind)
    logits = run.step([(0, 30)])
    workers.signal("a", signal.SIGKILL)
    started = time.monotonic()
    logits += run.step([(0, 1)])
    assert time.monotonic() - started < AT_ONCE_S
    assert (experts.ready, experts.lost_peers) == (True, ("a",))
    workers.signal("c", signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(PeerLostError, match="holds experts"):
            run.step([(0, 1)])
    assert (experts.ready, experts.lost_peers) == (False, ("a", "c"))
    workers.start({"d": EVEN}, kind)
    experts.set_route(make_route(2, TINY, {"b": ODD, "d": EVEN}))
    assert (experts.ready, experts.route_version, experts.lost_peers) == (True, 2, ())
    assert changes == [True, True, False, True]
    for _ in range(9):
        logits += run.step([(0, 1)])
    assert torch.equal(torch.cat(logits), local_logits(kind))


def test_a_hung_worker_is_lost_at_the_deadline_and_its_replica_takes_over(workers: Workers) -> None:
    held = {"a": EVEN, "b": ODD, "c": EVEN}
    workers.start(held, "blocks")
    experts = routed(workers, "blocks", timeout_s=2.0)
    experts.set_route(make_route(1, TINY, held))
    run = driver(experts, "blocks")
    logits = run.step([(0, 30)])
    workers.signal("a", signal.SIGSTOP)
    started = time.monotonic()
    logits += run.step([(0, 1)])
    assert 1.9 < time.monotonic() - started < DEADLINE_S
    assert experts.lost_peers == ("a",)
    for _ in range(9):
        logits += run.step([(0, 1)])
    assert torch.equal(torch.cat(logits), local_logits("blocks"))
    started = time.monotonic()
    experts.set_route(make_route(2, TINY, held))  # it is tried again, and still hangs
    assert time.monotonic() - started < DEADLINE_S
    assert (experts.ready, experts.lost_peers, experts.route_version) == (True, ("a",), 2)
