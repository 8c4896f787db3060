"""Tensors between an attention worker and an expert worker: one link a pair, every wait with a deadline.

A gloo process group over all workers would break as a whole when one dies. So each pair has a group of its own, on its
own prefix of a rendezvous store: a dead peer breaks its pair at once, a hung one at the deadline, and nobody else's.
The store is the expert worker's (`LinkServer`); the two agree on a `link_id` over gRPC, then meet there.

Each gloo message costs a rendezvous of its own and two wakes of a thread, far more than the bytes of a decode step. So
small tensors travel together, in one frame whose receiver need not know its length beforehand.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from cluster.errors import ConfigError, PeerLostError
from cluster.protocol import LinkOffer
from workers.experts.frame import Room, TensorSpec, Unpacking

MIN_WAIT_S = 0.001  # gloo takes a timeout of zero for none
# gloo's tags: room for the next frame must not take what travels by itself, and nobody ever sends the last.
FRAME, ALONE, NOTHING = 0, 1, 2


class PeerLink(Protocol):
    """One peer. Messages arrive whole and in order; any failure is final: open another link.

    One thread at a time sends and one receives.
    """

    def send(self, tensors: Sequence[torch.Tensor], deadline_s: float) -> None:
        """Hand over contiguous CPU tensors; returns when they are on their way. Raises `PeerLostError`."""

    def recv(self, specs: Sequence[TensorSpec], deadline_s: float) -> list[torch.Tensor]:
        """The peer's next tensors, in order; one `send` may be taken by several `recv`s, the first of which says what
        the next must ask for. They are the caller's until what another `send` sent is taken: then their memory is used
        again. Raises `PeerLostError` at the deadline or when the peer dies.
        """

    def close(self) -> None:
        """Break the link: every wait under way on it, of other threads and of the peer, ends with an error at once.

        Any thread, any number of times.
        """


class GlooLink:
    """A `PeerLink` over TCP between two processes' CPU memory."""

    def __init__(
        self,
        open_store: Callable[[], dist.Store],
        name: str,
        is_first: bool,
        open_timeout_s: float,
        tensor_host: str = "127.0.0.1",
        on_met: Callable[[], None] = lambda: None,
    ) -> None:
        """Meet the peer under `name` in the store; exactly one of the two says `is_first`.

        `tensor_host` is the address of this side's interface that the pair uses. Raises `PeerLostError` where the peer
        does not come in time: then a thread may be left that still waits. `on_met` is called once nobody does, on any
        thread.
        """
        self.name = name
        self._rank = 0 if is_first else 1
        self._peer = 1 - self._rank
        self._breaking = threading.Lock()
        self._fault: str | None = None
        # Before the rooms that gloo reads and writes: an object's attributes go in the order in which they came.
        self._group: dist.ProcessGroupGloo | None = None
        self._arriving: dist.Work | None = None
        self._leaving = Room()
        self._room, self._taken = Room(), Room()  # of what arrives next, and of what came before it
        self._message: Unpacking | None = None  # of which something is left

        def meet() -> dist.ProcessGroupGloo:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=tensor_host)]
            options._timeout = timedelta(seconds=open_timeout_s)
            return dist.ProcessGroupGloo(dist.PrefixStore(name, open_store()), self._rank, 2, options)

        self._group = self._in_time(meet, open_timeout_s, on_met)
        self._arriving = self._expect(self._group)

    def _in_time(
        self, meet: Callable[[], dist.ProcessGroupGloo], timeout_s: float, on_met: Callable[[], None]
    ) -> dist.ProcessGroupGloo:
        """`meet` in a thread of its own, which is left behind where it takes longer.

        torch's store client waits without end for a server that is stopped, whatever timeout it was given.
        """
        found: list[dist.ProcessGroupGloo] = []
        faults: list[RuntimeError] = []

        def run() -> None:
            try:
                found.append(meet())
            except RuntimeError as error:
                faults.append(error)
            finally:
                on_met()

        thread = threading.Thread(target=run, name=f"meet-{self.name}", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if not found:
            why = faults[0] if faults else TimeoutError(f"nobody was there within {timeout_s:.1f} s")
            raise self._lost("did not come to the rendezvous", why) from why
        return found[0]

    def send(self, tensors: Sequence[torch.Tensor], deadline_s: float) -> None:
        group, end = self._open(), time.monotonic() + deadline_s
        frame, alone = self._leaving.pack(tensors)
        try:
            group.send([frame], self._peer, FRAME).wait(_left(end))
            for tensor in alone:
                group.send([tensor], self._peer, ALONE).wait(_left(end))
        except RuntimeError as error:
            raise self._lost("took nothing", error) from error

    def recv(self, specs: Sequence[TensorSpec], deadline_s: float) -> list[torch.Tensor]:
        group, end = self._open(), time.monotonic() + deadline_s
        tensors = []
        try:
            for spec in specs:
                if self._message is None:
                    arriving = self._arriving
                    if arriving is None:  # another thread has closed the link meanwhile
                        raise RuntimeError("there is no connection any more")
                    arriving.wait(_left(end))
                    self._room, self._taken = self._taken, self._room
                    self._message = self._taken.unpack()
                    self._arriving = self._expect(group)
                tensor = self._message.take(spec)
                if tensor is None:
                    tensor = torch.empty(spec.shape, dtype=spec.dtype)
                    group.recv([tensor], self._peer, ALONE).wait(_left(end))
                tensors.append(tensor)
                if not self._message.num_left:
                    self._message = None
        except (RuntimeError, ValueError) as error:
            raise self._lost("sent nothing", error) from error
        return tensors

    def _expect(self, group: dist.ProcessGroupGloo) -> dist.Work:
        """Make room for the next frame: the peer sends it only once it knows of that, so better early than late."""
        return group.recv([self._room.tensor], self._peer, FRAME)  # a message may be shorter than the room for it

    def close(self) -> None:
        self._break("closed on this side")

    def _break(self, fault: str) -> None:
        with self._breaking:
            group, self._group = self._group, None
            self._fault = self._fault or fault
        if group is None:
            return
        # Of a gloo group `abort` and `shutdown` do nothing. But where one wait ends without a message, gloo closes the
        # connection, which ends every other wait, here and there.
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], self._peer, NOTHING).wait(timedelta(seconds=MIN_WAIT_S))
        self._arriving = None  # it holds what is left of the group

    def _open(self) -> dist.ProcessGroupGloo:
        if self._group is None:
            raise PeerLostError(f"the link {self.name!r} is broken: {self._fault}")
        return self._group

    def _lost(self, what: str, error: Exception) -> PeerLostError:
        """A broken pair stays broken: half a message may be under way."""
        self._break(f"the peer {what}: {error}")
        return PeerLostError(f"the link {self.name!r} broke: {self._fault}")


def _left(end: float) -> timedelta:
    return timedelta(seconds=max(MIN_WAIT_S, end - time.monotonic()))


class LinkServer:
    """An expert worker's side of the rendezvous: a store on `tensor_host`, at any free port."""

    def __init__(self, tensor_host: str, open_timeout_s: float) -> None:
        """`open_timeout_s`: how long `accept` waits for the other side. Raises `ConfigError` for an address that is
        none of this machine's.
        """
        self._tensor_host = tensor_host
        self._open_timeout_s = open_timeout_s
        try:
            family = socket.getaddrinfo(tensor_host, 0, type=socket.SOCK_STREAM)[0][0]
            # torch would listen on every interface.
            listener = socket.create_server((tensor_host, 0), family=family, backlog=128)
        except OSError as error:
            raise ConfigError(
                f"tensor_host {tensor_host!r} is no address that tensor links can listen on: {error}",
                param="tensor_host",
            ) from error
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            tensor_host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=open_timeout_s),
            master_listen_fd=listener.detach(),
        )
        self._offer = LinkOffer(host=tensor_host, port=port)

    def offer(self) -> LinkOffer:
        """Where a `LinkClient` finds this store."""
        return self._offer

    def accept(self, link_id: str) -> GlooLink:
        """Wait for the attention worker that comes under `link_id`. Any thread, several at once.

        Raises `PeerLostError` where it does not come within `open_timeout_s`.
        """
        # One connection to the store is one wait at a time: each link has its own.
        return GlooLink(self._store.clone, link_id, True, self._open_timeout_s, self._tensor_host)


class LinkClient:
    """An attention worker's side of the rendezvous, on its `tensor_host`."""

    def __init__(self, tensor_host: str, timeout_s: float) -> None:
        self._tensor_host = tensor_host
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._waiting: set[LinkOffer] = set()

    def connect(self, offer: LinkOffer, link_id: str) -> GlooLink:
        """Meet the expert worker that made `offer` under `link_id`. Any thread.

        Raises `PeerLostError` within the timeout, whatever the other side does. A try that a hung server holds up
        leaves its thread behind; until that one ends, the next raises at once, so that there are never more.
        """
        with self._lock:
            if offer in self._waiting:
                raise PeerLostError(f"an earlier try to meet the peer at {offer.host}:{offer.port} still waits")
            self._waiting.add(offer)

        def open_store() -> dist.Store:
            timeout = timedelta(seconds=self._timeout_s)
            return dist.TCPStore(offer.host, offer.port, is_master=False, timeout=timeout)

        def on_met() -> None:
            with self._lock:
                self._waiting.discard(offer)

        return GlooLink(open_store, link_id, False, self._timeout_s, self._tensor_host, on_met)
