"""Tensors between an attention worker and an expert worker: one link a pair, every wait with a deadline.

A gloo process group over all workers would break as a whole when one dies. So each pair has a group of its own, on its
own prefix of a rendezvous store: a dead peer breaks its pair at once, a hung one at the deadline, and nobody else's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from cluster.errors import PeerLostError

MIN_WAIT_S = 0.001  # gloo takes a timeout of zero for none


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the peer will send: the receiver allocates it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class PeerLink(Protocol):
    """One peer. Messages arrive whole and in order; any failure is final: open another link."""

    def send(self, tensors: Sequence[torch.Tensor], deadline_s: float) -> None: ...

    def recv(self, specs: Sequence[TensorSpec], deadline_s: float) -> list[torch.Tensor]: ...

    def close(self) -> None: ...


class GlooLink:
    """A `PeerLink` over TCP between two processes' CPU memory."""

    def __init__(self, store: dist.Store, name: str, is_first: bool, open_timeout_s: float) -> None:
        """Meet the peer under `name` in `store`; exactly one of the two says `is_first`.

        Raises `PeerLostError` where the peer does not come in time.
        """
        self.name = name
        self._rank = 0 if is_first else 1
        self._peer = 1 - self._rank
        self._fault: str | None = None
        self._group: dist.ProcessGroupGloo | None = None
        try:
            timeout = timedelta(seconds=open_timeout_s)
            self._group = dist.ProcessGroupGloo(dist.PrefixStore(name, store), self._rank, 2, timeout)
        except RuntimeError as error:
            raise self._lost("did not come to the rendezvous", error) from error

    def send(self, tensors: Sequence[torch.Tensor], deadline_s: float) -> None:
        """Hand over contiguous CPU tensors; returns when they are on their way. Raises `PeerLostError`."""
        group, end = self._open(), time.monotonic() + deadline_s
        try:
            for work in [group.send([tensor], self._peer, 0) for tensor in tensors if tensor.numel()]:
                work.wait(_left(end))
        except RuntimeError as error:
            raise self._lost("took nothing", error) from error

    def recv(self, specs: Sequence[TensorSpec], deadline_s: float) -> list[torch.Tensor]:
        """The peer's next tensors, in order. Raises `PeerLostError` at the deadline or when the peer dies."""
        group, end = self._open(), time.monotonic() + deadline_s
        tensors = [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
        try:
            for work in [group.recv([tensor], self._peer, 0) for tensor in tensors if tensor.numel()]:
                work.wait(_left(end))
        except RuntimeError as error:
            raise self._lost("sent nothing", error) from error
        return tensors

    def close(self) -> None:
        """Break the link; the peer's waits end with an error."""
        self._fault = self._fault or "closed on this side"
        self._group = None

    def _open(self) -> dist.ProcessGroupGloo:
        if self._group is None:
            raise PeerLostError(f"the link {self.name!r} is broken: {self._fault}")
        return self._group

    def _lost(self, what: str, error: Exception) -> PeerLostError:
        """A broken pair stays broken: half a message may be under way."""
        self._fault = f"the peer {what}: {error}"
        self._group = None
        return PeerLostError(f"the link {self.name!r} broke: {self._fault}")


def _left(end: float) -> timedelta:
    return timedelta(seconds=max(MIN_WAIT_S, end - time.monotonic()))
