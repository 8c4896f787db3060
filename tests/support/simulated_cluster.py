"""A cluster for tests of `reconcile`: values alone, in steps of simulated time, with slow loads and lost reports.

`step` runs `reconcile` once and carries out what it says. What must hold at all times is checked as it goes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from cluster.control.balance import Expert
from cluster.control.placement import Demand
from cluster.control.plan import Decision, End, Forget, Observed, Plan, Seen, Send, Start, Terms
from cluster.control.reconcile import reconcile
from cluster.control.restarts import Restarts
from cluster.control.topology import LOAD_SHARE, MEMORY_SHARE, Device, Node, Topology
from cluster.errors import WorkerLostError
from cluster.protocol import Assign, ModelShape, Route, WorkerReport
from cluster.store.records import WorkerRecord

STEP_S = 0.1
LEASE_S = 1.0
EXPERT_BYTES = 10
SHAPE = ModelShape(
    num_layers=5,
    moe_layers=(1, 2, 4),
    num_experts=6,
    expert_bytes=EXPERT_BYTES,
    dense_bytes=100,
    kv_token_bytes=1,
    max_model_len=64,
)
NUM_EXPERTS = len(SHAPE.moe_layers) * SHAPE.num_experts
DEMAND = Demand(
    load=((1.0,) * SHAPE.num_experts,) * len(SHAPE.moe_layers),
    expert_bytes=EXPERT_BYTES,
    num_expert_workers=2,
    num_attention_workers=2,
    attention_bytes=100,
    kv_bytes=20,
    max_copies=1,
)
TERMS = Terms(SHAPE, DEMAND, LEASE_S, most_kv_bytes=40)


def node(name: str, memory_bytes: int = 1000) -> Node:
    return Node(name, name, memory_bytes, (Device("cpu", "cpu", memory_bytes),))


@dataclass
class Process:
    """One worker process; `orders` wait for the time at which they are in effect."""

    record: WorkerRecord
    is_alive: bool = True
    hung_until_s: float = 0.0
    heard_s: float = 0.0
    held: frozenset[Expert] = frozenset()
    assign_version: int = 0
    route: Route | None = None
    orders: list[tuple[float, Assign | Route]] = field(default_factory=list)
    report: WorkerReport | None = None
    is_adopted: bool = False

    def uses(self) -> list[tuple[str, Expert]]:
        """(worker id, expert) of the route in effect and of those that are on their way."""
        routes = [order for _, order in self.orders if isinstance(order, Route)]
        return [use for route in (self.route, *routes) if route is not None for use in uses_of(route)]


def uses_of(route: Route) -> list[tuple[str, Expert]]:
    return [
        (route.peers[place].worker_id, Expert(row, i))
        for row, layer in enumerate(SHAPE.moe_layers)
        for i, owners in enumerate(route.owners[layer])
        for place in owners
    ]


class SimulatedCluster:
    """`load_s`: (least, most) seconds that an order takes to be in effect."""

    def __init__(self, seed: int, nodes: list[Node], terms: Terms = TERMS) -> None:
        self.random = random.Random(seed)
        self.terms = terms
        self.now_s = 0.0
        self.nodes = {n.id: n for n in nodes}
        self.lost_nodes: set[str] = set()
        self.processes: dict[str, Process] = {}  # by name, as the controller knows them
        self.starting: dict[str, tuple[float, WorkerRecord]] = {}
        self.plan = Plan()
        self.restarts = Restarts()
        self.num_started = 0
        self.starts: list[tuple[float, str]] = []
        self.load_s = (0.0, 0.3)
        self.start_s = (0.1, 1.0)
        self.report_loss = 0.0
        self.start_failure = 0.0
        self.errors: dict[str, str] = {}  # by name, that reports have
        self.decision: Decision | None = None

    # -------------------------------------------------------------------------------------------------------- faults

    def kill(self, name: str) -> None:
        self.processes[name].is_alive = False

    def hang(self, name: str, seconds: float) -> None:
        self.processes[name].hung_until_s = self.now_s + seconds

    def lose_node(self, name: str) -> None:
        self.lost_nodes.add(name)
        for process in self.processes.values():
            if process.record.node_id == name:
                process.is_alive = False
        for worker in [w for w, (_, record) in self.starting.items() if record.node_id == name]:
            del self.starting[worker]

    def return_node(self, name: str) -> None:
        self.lost_nodes.discard(name)

    def new_controller(self, epoch: int) -> None:
        """It knows the placement from the store and the workers from their records and reports; nothing else."""
        self.plan, self.decision = Plan(placement=self.plan.placement), None
        self.terms = replace(self.terms, first_version=epoch << 24)
        self.starting.clear()
        for process in self.processes.values():
            process.is_adopted = True
            process.assign_version = 0
            process.orders = [item for item in process.orders if isinstance(item[1], Route)]
            self._report(process)

    # ---------------------------------------------------------------------------------------------------------- steps

    def step(self) -> Decision:
        self.now_s += STEP_S
        self._carry_out_orders()
        self._finish_starts()
        self._check_routes_in_use()
        for process in self.processes.values():
            if process.is_alive and process.hung_until_s <= self.now_s and self.random.random() >= self.report_loss:
                self._report(process)
        seen = self.observed()
        self.decision = decision = reconcile(self.terms, seen, self.plan)
        self.plan = decision.plan
        self._check_decision(seen, decision)
        for action in decision.actions:
            self._act(action)
        return decision

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            self.step()

    def observed(self) -> Observed:
        return Observed(
            self.now_s,
            Topology(tuple(n for n in self.nodes.values() if n.id not in self.lost_nodes)),
            {
                name: Seen(p.record, p.report, self.now_s - p.heard_s, p.is_alive, p.is_adopted)
                for name, p in sorted(self.processes.items())
            },
            frozenset(self.starting),
            self.restarts.resting(self.now_s),
        )

    def experts(self) -> list[Process]:
        return [p for p in self.processes.values() if p.record.role == "expert" and p.is_alive]

    def attention(self) -> list[Process]:
        return [p for p in self.processes.values() if p.record.role == "attention" and p.is_alive]

    def is_converged(self) -> bool:
        """Everybody placed lives, every expert is held once, each attention worker's route covers all; all is quiet."""
        held = [expert for process in self.experts() for expert in process.held]
        return (
            self.decision is not None
            and self.plan.placement is not None
            and not any(process.orders or process.heard_s < self.now_s for process in self.processes.values())
            and not self.decision.actions
            and self.decision.problem is None
            and {w.id for w in self.plan.placement.workers} == {n for n, p in self.processes.items() if p.is_alive}
            and len(set(held)) == NUM_EXPERTS
            and all(p.route is not None and {e for _, e in uses_of(p.route)} == set(held) for p in self.attention())
        )

    # --------------------------------------------------------------------------------------------------------- inside

    def _report(self, process: Process) -> None:
        process.heard_s = self.now_s
        process.report = WorkerReport(
            worker_id=process.record.worker_id,
            name=process.record.name,
            epoch=1,
            error=self.errors.get(process.record.name),
            assign_version=process.assign_version,
            experts=self.terms.to_layers(process.held),
            # A worker gives no version to another controller's route.
            route_version=process.route.version
            if process.route and process.route.version >= self.terms.first_version
            else 0,
        )

    def _carry_out_orders(self) -> None:
        for process in self.processes.values():
            if process.is_alive and process.hung_until_s <= self.now_s:
                due = [order for at_s, order in process.orders if at_s <= self.now_s]
                process.orders = [item for item in process.orders if item[0] > self.now_s]
                for order in due:
                    if isinstance(order, Route):
                        process.route = order
                    else:
                        self._check_room(process, self.terms.from_layers(order.experts))
                        process.held = self.terms.from_layers(order.experts)
                        process.assign_version = order.version

    def _check_room(self, process: Process, wanted: frozenset[Expert]) -> None:
        """A worker refuses to load more than its limit, counting what it holds; `ExpertHost` does."""
        devices = {(n.id, d.id): d.memory_bytes for n in self.nodes.values() for d in n.devices}
        host_memory_bytes = int(devices[process.record.node_id, process.record.device_id] / MEMORY_SHARE)
        num_bytes = len(process.held | wanted) * self.terms.demand.expert_bytes
        assert num_bytes <= int(host_memory_bytes * LOAD_SHARE), f"{process.record.name} would refuse what it is told"

    def _finish_starts(self) -> None:
        for name, (at_s, record) in list(self.starting.items()):
            if at_s <= self.now_s:
                del self.starting[name]
                if self.random.random() < self.start_failure:
                    self.restarts.note_failure(name, self.now_s, WorkerLostError("it would not start"))
                else:
                    self.restarts.note_start(name)
                    self.processes[name] = Process(record, heard_s=self.now_s)

    def _act(self, action: object) -> None:
        if isinstance(action, Start):
            worker = action.worker
            assert worker.id not in self.processes
            assert worker.id not in self.starting
            self.num_started += 1
            self.starts.append((self.now_s, worker.id))
            record = WorkerRecord(
                name=worker.id,
                role=worker.role,
                node_id=worker.node_id,
                device_id=worker.device_id,
                address=f"{worker.id}:{self.num_started}",
                worker_id=f"{worker.id}/{self.num_started}",
                pid=self.num_started,
                memory_bytes=worker.memory_bytes,
                kv_bytes=worker.kv_bytes,
            )
            self.starting[worker.id] = (self.now_s + self.random.uniform(*self.start_s), record)
        elif isinstance(action, End):
            self.processes[action.record.name].is_alive = False
        elif isinstance(action, Forget):
            del self.processes[action.record.name]
            self.restarts.note_death(action.record.name, self.now_s, 0.0)
        elif isinstance(action, Send):
            process = self.processes[action.name]
            assert process.record.worker_id == action.worker_id
            last = max((at_s for at_s, _ in process.orders), default=0.0)
            at_s = max(last, self.now_s + self.random.uniform(*self.load_s))
            process.orders = [i for i in process.orders if not isinstance(action.message, Assign)]  # the newest wins
            process.orders.append((at_s, action.message))

    def _check_routes_in_use(self) -> None:
        """No attention worker may ask a live expert worker for what it has dropped."""
        by_id = {p.record.worker_id: p for p in self.experts()}
        for process in self.attention():
            for worker_id, expert in process.uses():
                holder = by_id.get(worker_id)
                assert holder is None or expert in holder.held, f"{process.record.name} would miss {expert}"

    def _check_decision(self, seen: Observed, decision: Decision) -> None:
        live = {
            w.record.worker_id: w
            for w in seen.workers.values()
            if w.is_running and w.report is not None and w.silent_s <= LEASE_S
        }
        held = {i: self.terms.from_layers(w.report.experts) for i, w in live.items() if w.report is not None}
        for action in decision.actions:
            if isinstance(action, Send) and isinstance(action.message, Route):
                for worker_id, expert in uses_of(action.message):
                    assert expert in held[worker_id], "a route names what its owner does not report"
        plan = decision.plan
        members = [i for i in plan.shards if i in live]
        if plan.shards_for and not plan.shards_problem and members:
            assigned = {e for i in members if i in plan.assigns for e in plan.assigns[i][-1].experts}
            have = {e for i in live for e in held[i]}
            missing = {Expert(row, i) for row in range(len(SHAPE.moe_layers)) for i in range(SHAPE.num_experts)}
            assert not missing - have - assigned, "an expert that nobody holds was not assigned at once"
