"""`python -m loadtests.links`: what a tensor link between two processes costs, and when it notices a peer that is gone.

Round trips of rows of 2048 floats, there and back, over a `GlooLink`; beside each the same bytes over the bare gloo
pair, in turns within one run. Then a peer that is killed, and one that is stopped, while a reply is due: the time from
the signal to the error. A process takes its time to end, and its connections stand for most of that: the time to its
end is given too, and what the error needed beyond it (below zero where that came first).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from cluster.errors import PeerLostError
from loadtests.processes import BenchError
from loadtests.report import Row, print_table, write_json
from loadtests.running import ended_by_sigterm
from workers.experts.exchange import GlooLink, LinkClient, LinkServer
from workers.experts.frame import TensorSpec

BENCH = "links"
HIDDEN = 2048
HUNG_DEADLINE_S = 0.5
WAIT_S = 30.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Effort:
    rows: tuple[int, ...] = (1, 8, 64, 1024)
    rounds: int = 5
    trips: int = 200  # a round
    losses: int = 7


QUICK = Effort(rows=(1, 64), rounds=1, trips=50, losses=1)


def serve(pipe: Connection) -> None:
    """A peer that sends back what it gets: over links, and over bare pairs for names that begin with `bare`."""
    torch.set_num_threads(1)
    server = LinkServer(HOST, WAIT_S)
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while (asked := pipe.recv()) is not None:
        name, num_rows, address = asked
        try:
            if name.startswith("bare"):
                group = bare_pair(store.port, name, 0)
                wait = timedelta(seconds=WAIT_S)
                rows, spare = torch.empty(num_rows, HIDDEN), torch.empty(num_rows, HIDDEN)
                arriving = group.recv([rows], 1, 0)
                while True:
                    arriving.wait(wait)
                    if rows[0, 0] < 0:
                        break
                    arriving = group.recv([spare], 1, 0)
                    group.send([rows], 1, 0).wait(wait)
                    rows, spare = spare, rows
            else:
                meeting = server.meet(name, address)
                pipe.send(meeting.address())
                link = meeting.link()
                while True:
                    link.send(link.recv([TensorSpec((num_rows, HIDDEN))], WAIT_S), WAIT_S)
        except PeerLostError:
            continue


def bare_pair(port: int, name: str, rank: int) -> dist.ProcessGroupGloo:
    wait = timedelta(seconds=WAIT_S)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
    options._timeout = wait
    store = dist.TCPStore(HOST, port, is_master=False, timeout=wait)
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, 2, options)


class EchoPeer:
    """The other process."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there,), daemon=True)
        self._process.start()
        there.close()  # so that the end of the process is the end of the pipe
        if not self._pipe.poll(WAIT_S):
            raise BenchError("the other process did not begin in time")
        self._port: int = self._pipe.recv()

    def link(self, num_rows: int) -> GlooLink:
        name = uuid.uuid4().hex

        def exchange(address: bytes) -> bytes:
            self._pipe.send((name, num_rows, address))
            if not self._pipe.poll(WAIT_S):
                raise BenchError("the other process did not answer in time")
            return bytes(self._pipe.recv())

        return LinkClient(HOST, WAIT_S).connect(name, exchange)

    def bare(self, num_rows: int) -> dist.ProcessGroupGloo:
        name = f"bare-{uuid.uuid4().hex}"
        self._pipe.send((name, num_rows, b""))
        return bare_pair(self._port, name, 1)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def median_s(trip: Callable[[], object], num_trips: int) -> float:
    times = []
    for _ in range(num_trips):
        started = time.perf_counter()
        trip()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def round_trips(peer: EchoPeer, num_rows: int, effort: Effort) -> tuple[float, float]:
    """-> (over a link, over the bare pair) in seconds: the median of rounds that take turns."""
    rows, back = torch.rand(num_rows, HIDDEN), torch.empty(num_rows, HIDDEN)
    wait = timedelta(seconds=WAIT_S)
    over_link, over_pair = [], []
    for _ in range(effort.rounds):
        link = peer.link(num_rows)

        def ask(link: GlooLink = link) -> torch.Tensor:
            link.send([rows], WAIT_S)
            return link.recv([TensorSpec((num_rows, HIDDEN))], WAIT_S)[0]

        over_link.append(median_s(ask, effort.trips))
        if not torch.equal(ask(), rows):
            raise AssertionError("a link changed what it carried")
        link.close()
        pair = peer.bare(num_rows)

        def ask_bare(pair: dist.ProcessGroupGloo = pair) -> None:
            arriving = pair.recv([back], 0, 0)  # there before it comes, as a link has it
            pair.send([rows], 0, 0).wait(wait)
            arriving.wait(wait)

        over_pair.append(median_s(ask_bare, effort.trips))
        pair.send([torch.full((num_rows, HIDDEN), -1.0)], 0, 0).wait(wait)
    return statistics.median(over_link), statistics.median(over_pair)


class EndWatch:
    """When a process of ours had ended, as `waitid` says it to a thread that does nothing else."""

    def __init__(self, pid: int) -> None:
        self._found: list[float] = []
        self._thread = threading.Thread(target=self._watch, args=(pid,), daemon=True)
        self._thread.start()

    def _watch(self, pid: int) -> None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._found.append(time.perf_counter())

    def at_s(self) -> float:
        """`time.perf_counter()`. Raises `BenchError` where it does not end."""
        self._thread.join(WAIT_S)
        if not self._found:
            raise BenchError("the other process did not end in time")
        return self._found[0]


def lose(number: signal.Signals) -> tuple[float, float | None]:
    """-> (seconds from the signal to the error, for a reply that is due at `HUNG_DEADLINE_S`; to the peer's end)."""
    peer = EchoPeer()
    try:
        link = peer.link(1)
        spec = [TensorSpec((1, HIDDEN))]
        link.send([torch.ones(1, HIDDEN)], WAIT_S)
        link.recv(spec, WAIT_S)
        watch = EndWatch(peer.pid) if number == signal.SIGKILL else None
        started = time.perf_counter()
        os.kill(peer.pid, number)
        try:
            link.recv(spec, HUNG_DEADLINE_S)
        except PeerLostError:
            error_s = time.perf_counter() - started
            return error_s, watch.at_s() - started if watch is not None else None
        raise AssertionError("a peer that is gone sent something")
    finally:
        peer.end()


def measure(effort: Effort) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    peer = EchoPeer()
    try:
        for num_rows in effort.rows:
            link_s, bare_s = round_trips(peer, num_rows, effort)
            goal = "250 µs" if num_rows == 64 else ""
            case = f"{num_rows}x{HIDDEN}"
            note = "the bare gloo pair"
            rows.append(Row(bench=BENCH, case=case, metric="round_trip_s", unit="s", value=link_s, baseline=bare_s,
                            note=note, goal=goal))  # fmt: skip
    finally:
        peer.end()
    for case, number, goal in (
        ("peer killed", signal.SIGKILL, "5 ms"),
        ("peer hung", signal.SIGSTOP, f"{HUNG_DEADLINE_S} s, its deadline"),
    ):
        losses = [lose(number) for _ in range(effort.losses)]
        errors = [error_s for error_s, _ in losses]
        for metric, value in (("error_p50_s", statistics.median(errors)), ("error_max_s", max(errors))):
            rows.append(Row(bench=BENCH, case=case, metric=metric, unit="s", value=value, goal=goal))
        ends = [end_s for _, end_s in losses if end_s is not None]
        if ends:
            beyond = [error_s - end_s for error_s, end_s in losses if end_s is not None]
            for metric, value in (
                ("end_p50_s", statistics.median(ends)),
                ("error_beyond_end_p50_s", statistics.median(beyond)),
                ("error_beyond_end_max_s", max(beyond)),
            ):
                rows.append(Row(bench=BENCH, case=case, metric=metric, unit="s", value=value))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.links", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--quick", action="store_true", help="two sizes, once")
    options = parser.parse_args(arguments)
    with ended_by_sigterm():
        rows = measure(QUICK if options.quick else Effort())
    print_table(rows, Console())
    if options.json is not None:
        write_json(rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
