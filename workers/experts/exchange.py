"""Tensors between an attention worker and an expert worker: one link a pair, every wait with a deadline.

A gloo process group over all workers would break as a whole when one dies. So each pair has a group of its own: a dead
peer breaks its pair at once, a hung one at the deadline, and nobody else's. The two tell each other where they listen
over an authenticated call (`OpenLink`), not in a store of torch's: that serves, and lists, its keys to whoever comes.

Each gloo message costs a rendezvous of its own and two wakes of a thread, far more than the bytes of a decode step. So
small tensors travel together, in one frame whose receiver need not know its length beforehand.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from cluster.errors import ConfigError, PeerLostError
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


class _Addresses(dist.Store):
    """All that gloo asks of a store where two meet: the one value of each of them, under whatever keys."""

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: for the other side's."""
        super().__init__()
        self.ours: Future[bytes] = Future()
        self.theirs: Future[bytes | None] = Future()  # None: they never come
        self._wait_s = wait_s
        self._our_key: str | None = None

    def set(self, key: str, value: bytes) -> None:
        self._our_key = key
        self.ours.set_result(bytes(value))

    def get(self, key: str) -> bytes:
        value = self.ours.result() if key == self._our_key else self.theirs.result(self._wait_s)
        if value is None:
            raise RuntimeError("it was given up")
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


class Meeting:
    """One side of a link that comes about, on a thread of its own; it ends by itself."""

    def __init__(self, name: str, *, is_first: bool, tensor_host: str, timeout_s: float) -> None:
        """Exactly one of the two says `is_first`. `tensor_host`: the address of the interface that this side uses."""
        self.name = name
        self._rank = 0 if is_first else 1
        self._tensor_host = tensor_host
        self._timeout_s = timeout_s
        self._addresses = _Addresses(timeout_s)
        self._group: Future[dist.ProcessGroupGloo] = Future()
        threading.Thread(target=self._meet, name=f"meet-{name}", daemon=True).start()

    def address(self) -> bytes:
        """Where this side listens, as gloo says it to gloo. Raises `PeerLostError` where it does not in time."""
        try:
            return self._addresses.ours.result(self._timeout_s)
        except TimeoutError:
            text = f"the link {self.name!r} cannot listen: gloo gave no address within {self._timeout_s:.1f} s"
            raise PeerLostError(text) from None

    def introduce(self, address: bytes) -> None:
        """Take the other side's address."""
        self._addresses.theirs.set_result(address)

    def give_up(self) -> None:
        """The other side's address never comes."""
        self._addresses.theirs.set_result(None)

    def link(self) -> GlooLink:
        """Wait until both are there. Raises `PeerLostError` where they are not in time."""
        try:
            group = self._group.result(self._timeout_s)
        except (RuntimeError, TimeoutError) as error:
            why = str(error) or f"it was not there within {self._timeout_s:.1f} s"
            raise PeerLostError(f"the peer of the link {self.name!r} did not come to the rendezvous: {why}") from error
        try:
            return GlooLink(self.name, group, 1 - self._rank, self._addresses)
        except RuntimeError as error:  # it makes room for a first frame, which fails where the peer is gone again
            raise PeerLostError(f"the peer of the link {self.name!r} came and went: {error}") from error

    def _meet(self) -> None:
        try:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._tensor_host)]
            options._timeout = timedelta(seconds=self._timeout_s)
            self._group.set_result(dist.ProcessGroupGloo(self._addresses, self._rank, 2, options))
        except Exception as error:  # whatever comes through gloo; who waits for the link is told
            if not self._addresses.ours.done():
                self._addresses.ours.set_exception(PeerLostError(f"the link {self.name!r} cannot listen: {error}"))
            # A new one: with the traceback of `error` it would keep what listens, until somebody collects garbage.
            self._group.set_exception(RuntimeError(str(error)))


class GlooLink:
    """A `PeerLink` over TCP between two processes' CPU memory; of a `Meeting`."""

    def __init__(self, name: str, group: dist.ProcessGroupGloo, peer: int, store: dist.Store) -> None:
        """`store`: the one that `group` was made with, which its Python side has to outlive."""
        self.name = name
        self._peer = peer
        self._breaking = threading.Lock()
        self._fault: str | None = None
        # Before the rooms that gloo reads and writes: an object's attributes go in the order in which they came.
        self._group: dist.ProcessGroupGloo | None = group
        self._arriving: dist.Work | None = None
        self._leaving = Room()
        self._room, self._taken = Room(), Room()  # of what arrives next, and of what came before it
        self._message: Unpacking | None = None  # of which something is left
        self._store = store
        self._arriving = self._expect(group)

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
    """An expert worker's side of links, on its `tensor_host`."""

    def __init__(self, tensor_host: str, open_timeout_s: float) -> None:
        """`open_timeout_s`: how long a link waits for the other side. Raises `ConfigError` for an address that is none
        of this machine's.
        """
        self._tensor_host = tensor_host
        self._open_timeout_s = open_timeout_s
        try:
            family = socket.getaddrinfo(tensor_host, 0, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((tensor_host, 0), family=family).close()
        except OSError as error:
            raise ConfigError(
                f"tensor_host {tensor_host!r} is no address that tensor links can listen on: {error}",
                param="tensor_host",
            ) from error

    def meet(self, link_id: str, address: bytes) -> Meeting:
        """Wait, beside, for the attention worker that is at `address`."""
        meeting = Meeting(link_id, is_first=True, tensor_host=self._tensor_host, timeout_s=self._open_timeout_s)
        meeting.introduce(address)
        return meeting


class LinkClient:
    """An attention worker's side of links, on its `tensor_host`."""

    def __init__(self, tensor_host: str, timeout_s: float) -> None:
        self._tensor_host = tensor_host
        self._timeout_s = timeout_s

    def connect(self, link_id: str, exchange: Callable[[bytes], bytes]) -> GlooLink:
        """Meet the expert worker that `exchange` tells our address and returns the address of. Any thread.

        Raises `PeerLostError` within the timeout twice, and what `exchange` does. A peer that hangs may be met still,
        and is found out at the link's first deadline.
        """
        meeting = Meeting(link_id, is_first=False, tensor_host=self._tensor_host, timeout_s=self._timeout_s)
        try:
            theirs = exchange(meeting.address())
        except BaseException:
            meeting.give_up()
            raise
        meeting.introduce(theirs)
        return meeting.link()
