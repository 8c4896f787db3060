"""What the controller observes, plans and does: the values that `reconcile` takes and gives. No decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from cluster.control.balance import Expert
from cluster.control.placement import Demand, PlacedWorker, Placement
from cluster.control.topology import Topology
from cluster.protocol import Assign, EngineState, ModelShape, Route, WorkerReport
from cluster.silence import HUNG_LEASES
from cluster.store.records import WorkerRecord

Held = frozenset[Expert]


@dataclass(frozen=True)
class Terms:
    """What stays the same while one controller leads."""

    shape: ModelShape
    demand: Demand
    lease_s: float
    most_kv_bytes: int  # that an attention worker can make use of
    first_version: int = 1  # of assignments and routes

    def from_layers(self, layers: Sequence[Sequence[int]]) -> Held:
        """The experts of `WorkerReport.experts`; a row of `Demand.load` is one MoE layer of the model."""
        rows = enumerate(self.shape.moe_layers)
        return frozenset(Expert(row, i) for row, layer in rows if layer < len(layers) for i in layers[layer])

    def to_layers(self, experts: Iterable[Expert]) -> tuple[tuple[int, ...], ...]:
        layers: list[list[int]] = [[] for _ in range(self.shape.num_layers)]
        for row, idx in sorted(experts):
            layers[self.shape.moe_layers[row]].append(idx)
        return tuple(map(tuple, layers))


@dataclass(frozen=True)
class Seen:
    """A worker that was started and is not known to have ended."""

    record: WorkerRecord
    report: WorkerReport | None  # its last one
    silent_s: float  # since then, or since it was recorded
    is_running: bool = True  # its process is there, or nobody can say
    is_adopted: bool = False  # it was led by another controller: what it does may be that one's orders


@dataclass(frozen=True)
class Observed:
    now_s: float
    topology: Topology
    workers: Mapping[str, Seen]  # by name
    starting: frozenset[str] = frozenset()  # names of workers whose start is under way
    resting: frozenset[str] = frozenset()  # names that failed and are not to be started yet
    starts_workers: bool = True  # False: workers come and go by themselves
    num_experts_awaited: int = 0  # expert workers that come by themselves and are not there yet


@dataclass(frozen=True)
class SentRoute:
    route: Route
    uses: frozenset[tuple[str, Expert]]  # (worker id, expert)
    at_s: float


@dataclass(frozen=True)
class SentAssign:
    message: Assign
    experts: Held
    at_s: float


@dataclass(frozen=True)
class Plan:
    """What was decided and sent until now. By worker id where a new process under an old name begins anew."""

    placement: Placement | None = None
    placed_for: frozenset[str] | None = None  # ids of the nodes that `placement` was made for
    place_problem: str | None = None
    shards: Mapping[str, Held] = field(default_factory=dict)  # by worker id: what it should hold
    shards_problem: str | None = None
    shards_for: frozenset[str] | None = None  # worker ids; None: no worker has had shards yet
    shards_slack: float | None = None  # how uneven they may be; None: they were only restored after a loss
    shards_at_s: float = 0.0  # when they were decided
    assigns: Mapping[str, tuple[SentAssign, ...]] = field(default_factory=dict)  # in effect and later, oldest first
    routes: Mapping[str, tuple[SentRoute, ...]] = field(default_factory=dict)  # those that may be in use, oldest first
    stopped: frozenset[str] = frozenset()  # ids of workers that were asked to end
    num_sent: int = 0


@dataclass(frozen=True)
class Start:
    worker: PlacedWorker


@dataclass(frozen=True)
class End:
    record: WorkerRecord
    kill: bool


@dataclass(frozen=True)
class Forget:
    """Its process is gone."""

    record: WorkerRecord


@dataclass(frozen=True)
class Send:
    name: str
    worker_id: str
    message: Assign | Route


Action = Start | End | Forget | Send


@dataclass(frozen=True)
class Decision:
    plan: Plan
    actions: tuple[Action, ...]
    problem: str | None  # why the cluster is not as it should be


def placement_of(records: Iterable[WorkerRecord]) -> Placement:
    """The placement that the workers there are stand for."""
    workers = [
        PlacedWorker(
            record.role,
            int(record.name.rpartition("-")[2]),
            record.node_id,
            record.device_id,
            record.memory_bytes,
            record.kv_bytes,
        )
        for record in records
        if record.role != "all"
    ]
    return Placement(tuple(sorted(workers, key=lambda worker: (worker.role, worker.index))))


def is_live(terms: Terms, worker: Seen) -> bool:
    """Its process is there and it reports."""
    return worker.is_running and worker.report is not None and worker.silent_s <= terms.lease_s


def is_hung(terms: Terms, worker: Seen) -> bool:
    """It was silent for too long to be waited for."""
    return worker.silent_s > HUNG_LEASES * terms.lease_s


def gist(terms: Terms, seen: Observed) -> object:
    """What `reconcile` decides by, but for the time: to be compared with that of another observation."""
    workers = tuple(
        (
            worker.record,
            msgspec.structs.replace(worker.report, state=EngineState()) if worker.report is not None else None,
            is_live(terms, worker),
            is_hung(terms, worker),
            worker.is_running,
            worker.is_adopted,
        )
        for worker in seen.workers.values()
    )
    return workers, seen.topology, seen.starting, seen.num_experts_awaited, seen.resting
