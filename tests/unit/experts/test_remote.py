"""Experts behind links between real processes: equal bits, and a peer that dies or hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

import pytest
import torch
import torch.distributed as dist

from cluster.errors import PeerLostError
from tests.support.models import TINY, Driver, random_weights
from tests.support.numerics import numerics
from workers.experts.backend import LocalExperts
from workers.experts.exchange import GlooLink, TensorSpec
from workers.experts.remote import MixedExperts, serve_experts, take_shard
from workers.models.decoder import Decoder
from workers.models.weights import ExpertWeights, MoEWeights

DEADLINE_S = 30.0
ALL = tuple(range(8))


def experts() -> list[ExpertWeights | None]:
    return [layer.mlp.experts if isinstance(layer.mlp, MoEWeights) else None for layer in random_weights(TINY).layers]


def open_store(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=DEADLINE_S))


def run_worker(port: int, name: str, ids: tuple[int, ...], kind: str) -> None:
    """An expert worker in a process of its own."""
    torch.set_num_threads(1)
    link = GlooLink(open_store(port), name, is_first=False, open_timeout_s=DEADLINE_S)
    shard = take_shard(experts(), [ids if layer.mlp == "moe" else () for layer in TINY.layers])
    serve_experts(shard, link, len(ALL), TINY.hidden, numerics(kind))


@dataclass
class Rendezvous:
    store: dist.TCPStore
    processes: list[BaseProcess]

    def worker(self, name: str, ids: tuple[int, ...], kind: str) -> GlooLink:
        process = get_context("spawn").Process(target=run_worker, args=(self.store.port, name, ids, kind))
        process.start()
        self.processes.append(process)
        return GlooLink(self.store, name, is_first=True, open_timeout_s=DEADLINE_S)


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    timeout = timedelta(seconds=DEADLINE_S)
    found = Rendezvous(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout), [])
    yield found
    for process in found.processes:
        process.kill()
        process.join()


def mixed(
    links: list[GlooLink], parts: list[tuple[int, ...]], kind: str, deadline_s: float = DEADLINE_S
) -> MixedExperts:
    """`parts[i]` are the experts behind link i; the rest is here."""
    owner = torch.full((len(ALL),), -1)
    for index, ids in enumerate(parts):
        owner[list(ids)] = index
    here = tuple(i for i in ALL if owner[i] < 0)
    shard = take_shard(experts(), [here if layer.mlp == "moe" else () for layer in TINY.layers])
    return MixedExperts(shard, links, [owner] * len(TINY.layers), numerics(kind), deadline_s)


@pytest.mark.parametrize("kind", [pytest.param("native", marks=pytest.mark.needs("compiler")), "blocks"])
@pytest.mark.parametrize("parts", [[(0, 2, 4, 6), (1, 3, 5, 7)], [(5, 6)]], ids=["remote", "mixed"])
def test_logits_are_those_of_one_worker_bit_for_bit(
    rendezvous: Rendezvous, parts: list[tuple[int, ...]], kind: str
) -> None:
    weights = random_weights(TINY)
    links = [rendezvous.worker(f"pair{i}", ids, kind) for i, ids in enumerate(parts)]
    backend = mixed(links, parts, kind)
    tokens = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    schedule = [[(0, 30)], *[[(0, 1)]] * 10]
    local = Decoder(TINY, weights, LocalExperts(experts(), numerics(kind)), numerics(kind))
    far = Decoder(TINY, weights, backend, numerics(kind))
    assert torch.equal(Driver(far, [tokens]).run(schedule)[0], Driver(local, [tokens]).run(schedule)[0])
    backend.close()
    for process in rendezvous.processes:
        process.join(DEADLINE_S)
        assert process.exitcode == 0


def call(backend: MixedExperts) -> torch.Tensor:
    hidden, ids = torch.ones(3, TINY.hidden), torch.tensor([[0, 1], [2, 3], [1, 0]])
    return backend.finish(backend.begin(0, hidden, ids, torch.full((3, 2), 0.5)))


@pytest.mark.parametrize(("number", "bound_s"), [(signal.SIGKILL, 0.5), (signal.SIGSTOP, 2.0)], ids=["dead", "hung"])
def test_a_peer_that_dies_is_an_error_at_once_and_a_hung_one_at_the_deadline(
    rendezvous: Rendezvous, number: signal.Signals, bound_s: float
) -> None:
    parts = [(0, 1, 2, 3), (4, 5, 6, 7)]
    links = [rendezvous.worker(f"pair{i}", ids, "blocks") for i, ids in enumerate(parts)]
    backend = mixed(links, parts, "blocks", deadline_s=1.0)
    call(backend)
    pid = rendezvous.processes[0].pid
    assert pid is not None
    os.kill(pid, number)
    started = time.monotonic()
    with pytest.raises(PeerLostError, match="pair0"):
        call(backend)
    assert time.monotonic() - started < bound_s
    with pytest.raises(PeerLostError, match="is broken"):
        links[0].send([torch.ones(1)], 1.0)
    whole = mixed([links[1]], [parts[1]], "blocks")  # the other pair is untouched
    hidden, ids = torch.ones(1, TINY.hidden), torch.tensor([[5, 1]])
    whole.finish(whole.begin(0, hidden, ids, torch.full((1, 2), 0.5)))


def test_a_peer_that_never_comes_is_an_error_in_time(rendezvous: Rendezvous) -> None:
    with pytest.raises(PeerLostError, match="rendezvous"):
        GlooLink(rendezvous.store, "nobody", is_first=True, open_timeout_s=0.5)


def test_messages_arrive_whole_and_in_order(rendezvous: Rendezvous) -> None:
    found: list[GlooLink] = []
    other = open_store(rendezvous.store.port)
    thread = threading.Thread(
        target=lambda: found.append(GlooLink(other, "p", is_first=False, open_timeout_s=DEADLINE_S))
    )
    thread.start()
    link = GlooLink(rendezvous.store, "p", is_first=True, open_timeout_s=DEADLINE_S)
    thread.join(DEADLINE_S)
    sent = [torch.arange(3), torch.empty(0, 4), torch.randn(5, 7)]
    sender = threading.Thread(target=link.send, args=(sent, DEADLINE_S))
    sender.start()
    specs = [TensorSpec((3,), torch.int64), TensorSpec((0, 4)), TensorSpec((5, 7))]
    got = found[0].recv(specs, DEADLINE_S)
    sender.join(DEADLINE_S)
    assert all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))
