"""What lies in a cluster's store: each key beside the value under it, and the one way to read what others wrote.

Under `PLACEMENT_KEY` a controller keeps its placement for the next one: what that is made of is the control plane's own
(`cluster.control.registry.StoredPlacement`), and nobody else reads it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from cluster.errors import UnreadableValueError
from cluster.protocol import EngineState, Lead, Message, Role
from cluster.store.base import Store

logger = logging.getLogger(__name__)

WORKERS = "workers/"  # + name -> WorkerRecord
STATUS_KEY = "status/cluster"  # -> ClusterStatus
LEAD_KEY = "controller/lead"  # -> Lead, under a lease: it is there while its controller lives
EPOCH_KEY = "controller/epoch"  # -> the highest epoch that anybody led with, in decimal
PLACEMENT_KEY = "placement/current"
CLUSTER_ID_KEY = "cluster/id"  # -> which cluster it is, whatever others have its name (`cluster.control.identity`)

STALE_S = 5.0  # a status that is older is no news: its controller writes it anew several times within that
MAX_EPOCH = 2**39  # an epoch is a part of orders' versions, which are 64-bit numbers
MAX_STORED_EPOCH = 2**38  # no cluster lives to count so far; whoever leads next must have numbers left above it
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)  # what a decoder says to bytes of any kind

T = TypeVar("T")


class WorkerRecord(Message, frozen=True):
    """`workers/<name>`: a worker that was started and is not known to have ended. Written by who started it."""

    name: str
    role: Role
    node_id: str
    device_id: str
    address: str
    worker_id: str
    pid: int
    memory_bytes: int
    kv_bytes: int = 0


class NodeStatus(Message, frozen=True):
    node_id: str
    memory_bytes: int
    devices: tuple[str, ...] = ()
    is_alive: bool = True


class WorkerStatus(Message, frozen=True):
    name: str
    role: Role
    node_id: str
    address: str
    pid: int
    condition: Literal["starting", "serving", "lost"]
    num_experts: int = 0  # held, over all layers
    shards: tuple[tuple[int, ...], ...] = ()  # by layer: the experts that it holds
    state: EngineState = EngineState()


class StartFailure(Message, frozen=True):
    """Why the cluster does not come up by being tried again: somebody has to change something."""

    code: str  # of `cluster.errors`
    message: str
    worker: str = ""  # the name of the one that keeps failing in this way; "": there is no room for all of them


class LeftOut(Message, frozen=True):
    """A worker that the placement has no use for, though it was asked for or is there."""

    worker: str  # its name, or that of the one that would be next
    reason: str


class ClusterStatus(Message, frozen=True):
    """`status/cluster`: what the controller last saw, for people."""

    cluster: str
    model: str
    epoch: int
    controller_id: str
    at_s: float  # time.time()
    num_layers: int
    num_experts: int
    nodes: tuple[NodeStatus, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()
    problem: str | None = None  # why the cluster is not as it should be
    failures: tuple[StartFailure, ...] = ()  # why some of it never will be
    left_out: tuple[LeftOut, ...] = ()


_decode_record = msgspec.json.Decoder(WorkerRecord).decode
_decode_status = msgspec.json.Decoder(ClusterStatus).decode
_decode_lead = msgspec.json.Decoder(Lead).decode


class Reader:
    """Reads values again and again; of one that cannot be read it tells once."""

    def __init__(self) -> None:
        self._told: dict[str, bytes] = {}  # by key: the last value that could not be read

    def read(self, key: str, value: bytes, decode: Callable[[bytes], T]) -> T | None:
        """What `decode` makes of `value`; None where it cannot be read."""
        try:
            found = decode(value)
        except UNREADABLE as error:
            if self._told.get(key) != value:
                logger.warning("the store's %s cannot be read and is passed over: %s", key, error)
                self._told[key] = value
            return None
        self._told.pop(key, None)
        return found

    def read_worker(self, key: str, value: bytes) -> WorkerRecord | None:
        """The record that stands under `key`; None for what is none of this release, or another name's."""

        def decode(value: bytes) -> WorkerRecord:
            record = _decode_record(value)
            if key != WORKERS + record.name or not re.fullmatch(rf"{record.role}-\d{{1,9}}", record.name):
                raise ValueError(f"it is the record of {record.name!r}")
            return record

        return self.read(key, value, decode)


async def read_status(store: Store) -> ClusterStatus | None:
    """What the controller last saw; None where none has been there.

    Raises `StoreUnavailableError`, and `UnreadableValueError` for what another release wrote.
    """
    entry = await store.get(STATUS_KEY)
    return None if entry is None else _decoded(STATUS_KEY, entry.value, _decode_status)


async def read_lead(store: Store) -> Lead | None:
    """Who leads; None where nobody does. Raises as `read_status`."""
    entry = await store.get(LEAD_KEY)
    return None if entry is None else _decoded(LEAD_KEY, entry.value, decode_lead)


def decode_lead(value: bytes) -> Lead:
    """Raises one of `UNREADABLE`."""
    lead = _decode_lead(value)
    _check_epoch(lead.epoch)
    return lead


def decode_epoch(value: bytes) -> int:
    """Raises one of `UNREADABLE`."""
    return _check_epoch(int(value), MAX_STORED_EPOCH)


def _check_epoch(epoch: int, highest: int = MAX_EPOCH) -> int:
    if not 0 <= epoch <= highest:
        raise ValueError(f"an epoch is a number from 0 to {highest}")
    return epoch


def _decoded(key: str, value: bytes, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(value)
    except UNREADABLE as error:
        raise UnreadableValueError(
            f"the store's {key} cannot be read, run all of the cluster from one release: {error}"
        ) from None
