"""Which worker runs where, and with how much memory: one pure function from what there is and what is wanted.

Workers are kept where they are while their device is there and has room. A new one goes to the failure domain with
the fewest workers of its role, there to the device with the fewest workers, and then to the emptiest. Which experts
the workers hold is not said here: `cluster.control.shards` decides that, by who lives and what each has already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, NamedTuple

from cluster.control.topology import Topology
from cluster.errors import InvalidValueError, PlacementError


@dataclass(frozen=True)
class Demand:
    """What is to be served. Raises `InvalidValueError` where a number is out of range."""

    load: tuple[tuple[float, ...], ...]  # [MoE layers][experts], in any one unit, such as tokens/s; (): a dense model
    expert_bytes: int  # one expert of one layer
    num_expert_workers: int  # at most; fewer where the nodes have room for fewer; 0 for a dense model
    num_attention_workers: int
    attention_bytes: int  # an attention worker's weights and working space
    kv_bytes: int  # KV room that an attention worker has at least
    max_copies: int = 2  # of one expert, each in a failure domain of its own, as far as memory goes
    slack: float = 0.1  # imbalance that is borne before experts move; see `balance.assign`

    def __post_init__(self) -> None:
        for name, least in (
            ("expert_bytes", 1),
            ("num_expert_workers", 1 if self.load else 0),
            ("num_attention_workers", 1),
            ("attention_bytes", 0),
            ("kv_bytes", 0),
            ("max_copies", 1),
            ("slack", 0.0),
        ):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise InvalidValueError(f"{name} must be at least {least}, not {value}", param=name)
        if bool(self.num_experts) != bool(self.num_expert_workers) or not all(
            0.0 <= load < math.inf for row in self.load for load in row
        ):
            raise InvalidValueError("load needs a finite number of at least 0 for each expert", param="load")

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.load))


@dataclass(frozen=True)
class PlacedWorker:
    """One worker. An attention worker's memory is `attention_bytes` and its KV room; an expert worker's is for experts.

    Over all placements of a cluster an index is not given to another worker while its old one is in `current`.
    """

    role: Literal["attention", "expert"]
    index: int
    node_id: str
    device_id: str
    memory_bytes: int
    kv_bytes: int = 0

    @property
    def id(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def place(self) -> tuple[str, str]:
        return self.node_id, self.device_id


@dataclass(frozen=True)
class Placement:
    workers: tuple[PlacedWorker, ...]  # attention workers first, each role by index

    def of_role(self, role: Literal["attention", "expert"]) -> tuple[PlacedWorker, ...]:
        return tuple(worker for worker in self.workers if worker.role == role)


def place(topology: Topology, demand: Demand, current: Placement | None = None) -> Placement:
    """Where `demand` runs on `topology`; workers of `current` stay where they fit. Deterministic.

    The expert workers have room for every expert, and no device's memory is exceeded. When workers of `current` are
    gone, the others keep what they have. (Where a lost attention worker finds room in no other way, an expert worker
    gives way to it.)
    Raises `PlacementError` naming what does not fit.
    """
    error: PlacementError | None = None
    for effort in EFFORTS:
        try:
            return _place(topology, demand, current or Placement(()), effort)
        except PlacementError as raised:  # try again with less wished for
            error = raised
    assert error is not None
    raise error


class _Effort(NamedTuple):
    """What is wished for beside what must be."""

    keep_experts: bool  # new attention workers take nothing from expert workers that are there
    keep_kv: bool  # attention workers keep the KV room that they have above the least
    spread: bool  # workers go to failure domains evenly, rather than to where there is most room


EFFORTS = (
    _Effort(keep_experts=True, keep_kv=True, spread=True),
    _Effort(keep_experts=True, keep_kv=False, spread=True),
    _Effort(keep_experts=False, keep_kv=False, spread=True),
    _Effort(keep_experts=False, keep_kv=False, spread=False),
)


def _place(topology: Topology, demand: Demand, current: Placement, effort: _Effort) -> Placement:
    floor = _Floor(topology, spread=effort.spread)
    attention = _kept_attention(floor, demand, current, keep_kv=effort.keep_kv)
    if effort.keep_experts:
        experts = _kept_experts(floor, demand, current)
        attention += _new_attention(floor, demand, current, attention)
    else:
        attention += _new_attention(floor, demand, current, attention)
        experts = _kept_experts(floor, demand, current)
    experts += _new_experts(floor, demand, current, experts)
    experts = _grow_to_fit(floor, demand, experts)
    keep = [worker.id for worker in current.workers] if effort.keep_kv else []
    attention = sorted(floor.share_out_kv(attention, keep), key=lambda worker: worker.index)
    experts.sort(key=lambda worker: worker.index)
    return Placement((*attention, *experts))


class _Floor:
    """The room that is left on each device while workers are put on it."""

    def __init__(self, topology: Topology, *, spread: bool) -> None:
        self.spread = spread
        self.domains = {node.id: node.failure_domain for node in topology.nodes}
        self.room = {(n.id, device.id): device.memory_bytes for n in topology.nodes for device in n.compute_devices}
        self.num_workers: Counter[tuple[str, str]] = Counter()

    def take(self, place: tuple[str, str], memory_bytes: int) -> None:
        self.room[place] -= memory_bytes
        self.num_workers[place] += 1

    def best_device(
        self, room: dict[tuple[str, str], int], least_bytes: int, peers: Sequence[str]
    ) -> tuple[str, str] | None:
        """A device with `room` for `least_bytes`, away from the nodes of `peers`."""
        in_domain = Counter(self.domains[node_id] for node_id in peers)

        def order(place: tuple[str, str]) -> tuple[float, ...]:
            return (in_domain[self.domains[place[0]]], self.num_workers[place]) if self.spread else ()

        fit = [place for place, free in room.items() if free >= least_bytes]
        return min(fit, key=lambda place: (*order(place), -room[place], place), default=None)

    def share_out_kv(self, workers: Sequence[PlacedWorker], keep: Sequence[str]) -> list[PlacedWorker]:
        """What is left on a device becomes KV room of the new attention workers on it, in even parts."""
        new = Counter(worker.place for worker in workers if worker.id not in keep)
        extra = {place: self.room[place] // num for place, num in new.items()}
        return [
            worker
            if worker.id in keep
            else replace(
                worker,
                memory_bytes=worker.memory_bytes + extra[worker.place],
                kv_bytes=worker.kv_bytes + extra[worker.place],
            )
            for worker in workers
        ]


def _kept_attention(floor: _Floor, demand: Demand, current: Placement, *, keep_kv: bool) -> list[PlacedWorker]:
    """Those of `current` that still fit, with the least room they need (`keep_kv`: with what they have)."""
    need = demand.attention_bytes + demand.kv_bytes
    workers: list[PlacedWorker] = []
    for worker in current.of_role("attention"):
        room = floor.room.get(worker.place, -1)
        if room >= need and len(workers) < demand.num_attention_workers:
            memory_bytes = max(need, min(worker.memory_bytes, room)) if keep_kv else need
            floor.take(worker.place, memory_bytes)
            workers.append(replace(worker, memory_bytes=memory_bytes, kv_bytes=memory_bytes - demand.attention_bytes))
    return workers


def _new_attention(
    floor: _Floor, demand: Demand, current: Placement, kept: Sequence[PlacedWorker]
) -> list[PlacedWorker]:
    need = demand.attention_bytes + demand.kv_bytes
    workers: list[PlacedWorker] = []
    indices = _unused_indices(current, "attention")
    while (num := len(kept) + len(workers)) < demand.num_attention_workers:
        place = floor.best_device(floor.room, need, [worker.node_id for worker in (*kept, *workers)])
        if place is None:
            freest = max(floor.room.items(), key=lambda item: item[1], default=None)
            where = f"the freest device, {'/'.join(freest[0])}, has {freest[1]}" if freest else "there is no device"
            raise PlacementError(
                f"attention worker {num + 1} of {demand.num_attention_workers} needs {need} bytes "
                f"({demand.attention_bytes} for weights, {demand.kv_bytes} for KV) and {where}: "
                "ask for fewer attention workers or less KV room, or add memory"
            )
        floor.take(place, need)
        workers.append(PlacedWorker("attention", next(indices), *place, need, demand.kv_bytes))
    return workers


def _kept_experts(floor: _Floor, demand: Demand, current: Placement) -> list[PlacedWorker]:
    """Those of `current` that still fit, with the room they had or what is left of it."""
    workers: list[PlacedWorker] = []
    for worker in current.of_role("expert"):
        memory_bytes = min(worker.memory_bytes, floor.room.get(worker.place, 0))
        if memory_bytes >= demand.expert_bytes and len(workers) < demand.num_expert_workers:
            floor.take(worker.place, memory_bytes)
            workers.append(replace(worker, memory_bytes=memory_bytes))
    return workers


def _new_experts(floor: _Floor, demand: Demand, current: Placement, kept: Sequence[PlacedWorker]) -> list[PlacedWorker]:
    """As many as are asked for and find room; those on one device share what is left on it."""
    new: list[tuple[str, str]] = []
    while len(kept) + len(new) < demand.num_expert_workers:
        shares = {place: room // (new.count(place) + 1) for place, room in floor.room.items()}
        peers = [worker.node_id for worker in kept] + [node_id for node_id, _ in new]
        place = floor.best_device(shares, demand.expert_bytes, peers)
        if place is None:
            break
        floor.take(place, 0)
        new.append(place)
    num_slots = {place: floor.room[place] // demand.expert_bytes for place in new}
    workers: list[PlacedWorker] = []
    for n, (index, place) in enumerate(zip(_unused_indices(current, "expert"), new, strict=False)):
        slots = -(-num_slots[place] // new[n:].count(place))  # of what is left, an even part, rounded up
        num_slots[place] -= slots
        memory_bytes = min(slots, demand.num_experts) * demand.expert_bytes
        floor.room[place] -= memory_bytes
        workers.append(PlacedWorker("expert", index, *place, memory_bytes))
    return workers


def _grow_to_fit(floor: _Floor, demand: Demand, workers: list[PlacedWorker]) -> list[PlacedWorker]:
    """Give workers more of what their devices have left, where they cannot hold all experts together."""
    missing = demand.num_experts - sum(worker.memory_bytes // demand.expert_bytes for worker in workers)
    grown: list[PlacedWorker] = []
    for worker in workers:
        whole, rest = divmod(worker.memory_bytes, demand.expert_bytes)
        num_more = max(0, min(missing, (rest + floor.room[worker.place]) // demand.expert_bytes))
        more_bytes = max(0, (whole + num_more) * demand.expert_bytes - worker.memory_bytes)
        floor.room[worker.place] -= more_bytes
        missing -= num_more
        grown.append(replace(worker, memory_bytes=worker.memory_bytes + more_bytes))
    if missing > 0:
        raise PlacementError(
            f"{demand.num_experts} experts of {demand.expert_bytes} bytes do not fit: beside "
            f"{demand.num_attention_workers} attention workers there is room for {demand.num_experts - missing} on "
            f"{len(grown)} expert workers: allow more expert workers, add memory, or ask for less KV room"
        )
    return grown


def _unused_indices(current: Placement, role: Literal["attention", "expert"]) -> Iterator[int]:
    used = {worker.index for worker in current.of_role(role)}
    return (index for index in count() if index not in used)
