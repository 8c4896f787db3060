"""What to do next: one pure function from what is observed and what was planned to actions and the next plan.

The controller calls it again and again, so each call does only the next step towards the goal. Three things are kept
apart. *Starts*: who should run where, `place()` over the nodes that there are. *Shards*: which experts each live
expert worker should hold; decided again whenever one joins or is lost, so that what nobody holds is assigned at once.
*Routes*: where attention workers find experts, which names only what live workers report that they hold.

Experts move without a gap: load at the new place, route there, and only when no attention worker uses a route to the
old place any more, drop there. An `Assign` therefore has what is wanted and what is still in use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cluster.control.balance import Expert, ShardProblem, assign
from cluster.control.placement import PlacedWorker, Placement, place
from cluster.control.plan import (
    Action,
    Decision,
    End,
    Forget,
    Held,
    Observed,
    Plan,
    Seen,
    Send,
    SentAssign,
    SentRoute,
    Start,
    Terms,
    is_hung,
    is_live,
    placement_of,
)
from cluster.control.topology import LOAD_SHARE, MEMORY_SHARE
from cluster.errors import PlacementError
from cluster.protocol import Assign, Peer, Route, WorkerReport
from cluster.store.records import WorkerRecord

RETRY_S = 2.0  # before an assignment or a route that failed is sent again
SPARE_EXPERTS = 1  # that a full device may hold beside what fits, so that full workers can exchange, if they take it


def reconcile(terms: Terms, seen: Observed, plan: Plan) -> Decision:
    """The next step. `Forget` takes effect before the next call; a `Send` repeats nothing that was sent."""
    plan = _placed(terms, seen, _pruned(seen, plan))
    step = _Step(terms, seen, plan)
    plan = step.plan = step.decide_shards()
    route_actions = step.send_routes()
    assign_actions = step.send_assigns()
    process_actions = step.start_and_end() if seen.starts_workers else []
    return Decision(step.plan, (*process_actions, *assign_actions, *route_actions), step.problem())


def _pruned(seen: Observed, plan: Plan) -> Plan:
    """Without what was sent to processes that are gone, and without routes that nobody uses any more."""
    there = {w.record.worker_id: w for w in seen.workers.values()}
    routes: dict[str, tuple[SentRoute, ...]] = {}
    assigns: dict[str, tuple[SentAssign, ...]] = {}
    for worker_id, worker in there.items():
        route_version = worker.report.route_version if worker.report is not None else 0
        assign_version = worker.report.assign_version if worker.report is not None else 0
        if sent_routes := plan.routes.get(worker_id):
            in_effect = route_version if any(sent.route.version == route_version for sent in sent_routes) else 0
            routes[worker_id] = tuple(sent for sent in sent_routes if sent.route.version >= in_effect)
        if sent_assigns := plan.assigns.get(worker_id):
            in_effect = assign_version if any(sent.message.version == assign_version for sent in sent_assigns) else 0
            assigns[worker_id] = tuple(sent for sent in sent_assigns if sent.message.version >= in_effect)
    return replace(
        plan,
        shards={worker_id: held for worker_id, held in plan.shards.items() if worker_id in there},
        assigns=assigns,
        routes=routes,
        stopped=plan.stopped & there.keys(),
    )


def _placed(terms: Terms, seen: Observed, plan: Plan) -> Plan:
    """The plan with a placement for the nodes that there are."""
    if not seen.starts_workers:
        return replace(plan, placement=placement_of([worker.record for worker in seen.workers.values()]))
    nodes = frozenset(node.id for node in seen.topology.nodes)
    if nodes == plan.placed_for:
        return plan
    try:
        placement = place(seen.topology, terms.demand, plan.placement)
    except PlacementError as error:
        return replace(plan, placed_for=nodes, place_problem=error.message)
    workers = tuple(_with_useful_kv(worker, terms.most_kv_bytes) for worker in placement.workers)
    return replace(plan, placement=Placement(workers), placed_for=nodes, place_problem=None)


def _with_useful_kv(worker: PlacedWorker, most_kv_bytes: int) -> PlacedWorker:
    """Without the KV room that it would not use: the experts of a lost worker may need it."""
    excess = max(0, worker.kv_bytes - most_kv_bytes)
    return replace(worker, kv_bytes=worker.kv_bytes - excess, memory_bytes=worker.memory_bytes - excess)


class _Step:
    """What one call of `reconcile` works out from its arguments."""

    def __init__(self, terms: Terms, seen: Observed, plan: Plan) -> None:
        self.terms, self.seen, self.plan = terms, seen, plan
        placed = plan.placement.workers if plan.placement is not None else ()
        self.placed = {(worker.id, worker.node_id): worker for worker in placed}
        self.live = {name: worker for name, worker in seen.workers.items() if is_live(terms, worker)}
        self.experts = {  # live expert workers, by worker id
            worker.record.worker_id: worker
            for name, worker in sorted(self.live.items())
            if worker.record.role == "expert"
        }
        self.held = {worker_id: terms.from_layers(_report(w).experts) for worker_id, w in self.experts.items()}
        self.holders: dict[Expert, list[str]] = defaultdict(list)  # worker ids
        for worker_id, held in self.held.items():
            for expert in held:
                self.holders[expert].append(worker_id)
        self.routable: dict[Expert, list[str]] = defaultdict(list)
        for worker_id in self.experts:
            for expert in self._kept(worker_id):
                self.routable[expert].append(worker_id)
        self.all_experts = [Expert(row, i) for row, load in enumerate(terms.demand.load) for i in range(len(load))]

    def is_placed(self, record: WorkerRecord) -> bool:
        return (record.name, record.node_id) in self.placed

    # ------------------------------------------------------------------------------------------------------ processes

    def start_and_end(self) -> list[Action]:
        actions: list[Action] = []
        nodes = {node.id for node in self.seen.topology.nodes}
        for worker in self.seen.workers.values():
            record = worker.record
            is_silent = is_hung(self.terms, worker)
            if not worker.is_running or (is_silent and record.node_id not in nodes):
                actions.append(Forget(record))
            elif is_silent:
                actions.append(End(record, kill=True))
            elif not self.is_placed(record) and record.worker_id not in self.plan.stopped and not self._used(record):
                self.plan = replace(self.plan, stopped=self.plan.stopped | {record.worker_id})
                actions.append(End(record, kill=False))
        busy = self.seen.workers.keys() | self.seen.starting | self.seen.resting
        starts = [w for w in self.placed.values() if w.id not in busy and w.node_id in nodes]
        return [*actions, *map(Start, starts)]

    def _used(self, record: WorkerRecord) -> bool:
        """Whether an attention worker may still ask it for experts."""
        if record.role != "expert":
            return False
        uses, is_known = self.uses()
        return not is_known or any(worker_id == record.worker_id for worker_id, _ in uses)

    # --------------------------------------------------------------------------------------------------------- shards

    def decide_shards(self) -> Plan:
        """Decide again who should hold what, where another set of expert workers lives than the last time.

        What was restored after a loss is balanced once it is in place.
        """
        plan = self.plan
        members = {worker_id: w for worker_id, w in self.experts.items() if self.is_placed(w.record)}
        ids = frozenset(members)
        is_settled = all(self.held[worker_id] == plan.shards.get(worker_id) for worker_id in members)
        if not self.all_experts or (ids == plan.shards_for and (plan.is_balanced or not is_settled)):
            return plan
        if plan.shards_for is None and not any(self.held.values()) and self._are_more_coming():
            return plan  # the first time: rather than load all on the first and move half of it, wait for the others
        slots = self._slots(members)
        missing = len(self.all_experts) - sum(slots.values())
        if missing > 0:
            problem = f"{missing} of {len(self.all_experts)} experts have no room on the {len(members)} expert workers"
            shards = {worker_id: plan.shards.get(worker_id, self.held[worker_id]) for worker_id in members}
        else:
            problem = None
            shards = self._balanced(members, slots)
        is_balanced = ids == plan.shards_for or problem is not None  # after a loss once more, when all is in place
        return replace(plan, shards=shards, shards_for=ids, shards_problem=problem, is_balanced=is_balanced)

    def _are_more_coming(self) -> bool:
        """Whether expert workers are on their way that have not failed yet."""
        names = {worker.record.name for worker in self.experts.values()}
        coming = {w.id for w in self.placed.values() if w.role == "expert"} - names - self.seen.resting
        return bool(coming) or any(name.startswith("expert-") for name in self.seen.starting)

    def _slots(self, members: Mapping[str, Seen]) -> dict[str, int]:
        """Experts that fit on each; more than its share where the live ones must take those of lost ones."""
        size = self.terms.demand.expert_bytes
        slots = {worker_id: worker.record.memory_bytes // size for worker_id, worker in members.items()}
        missing = len(self.all_experts) - sum(slots.values())
        room = {place: self._capacity(place) for place in {self._place(w.record) for w in members.values()}}
        for worker_id, worker in members.items():
            room[self._place(worker.record)] -= slots[worker_id]
        for worker_id, worker in sorted(members.items(), key=lambda item: -room[self._place(item[1].record)]):
            more = max(0, min(missing, room[self._place(worker.record)]))
            slots[worker_id] += more
            room[self._place(worker.record)] -= more
            missing -= more
        return slots

    def _balanced(self, members: Mapping[str, Seen], slots: Mapping[str, int]) -> dict[str, Held]:
        demand = self.terms.demand
        domain_of = {node.id: node.failure_domain for node in self.seen.topology.nodes}
        domains = [domain_of.get(w.record.node_id, w.record.node_id) for w in members.values()]
        current: Sequence[Collection[Expert]] = self._current(members, domains)
        # Where a worker holds more than its share, balance first and only then trim: what is trimmed is not chosen well
        roomy = [max(slots[worker_id], len(has)) for worker_id, has in zip(members, current, strict=True)]
        exact = [slots[worker_id] for worker_id in members]
        for num_slots in (roomy, exact):
            current = assign(ShardProblem(demand.load, num_slots, domains, demand.max_copies, demand.slack), current)
        return {worker_id: frozenset(has) for worker_id, has in zip(members, current, strict=True)}

    def _current(self, members: Mapping[str, Seen], domains: Sequence[str]) -> list[set[Expert]]:
        """What each has, or should have where no live one has it; of too many copies those that were planned."""
        domain_of = dict(zip(members, domains, strict=True))
        current: dict[str, set[Expert]] = {worker_id: set() for worker_id in members}
        planned = {worker_id: self.plan.shards.get(worker_id, frozenset()) for worker_id in members}
        for expert in self.all_experts:
            holders = [worker_id for worker_id in self.holders[expert] if worker_id in members]
            if not holders:
                holders = [worker_id for worker_id in members if expert in planned[worker_id]]
            taken: list[str] = []
            for worker_id in sorted(holders, key=lambda worker_id: expert not in planned[worker_id]):
                if len(taken) < self.terms.demand.max_copies and domain_of[worker_id] not in taken:
                    taken.append(domain_of[worker_id])
                    current[worker_id].add(expert)
        return list(current.values())

    def _place(self, record: WorkerRecord) -> tuple[str, str]:
        """What shares one memory: a device, or where others start workers, each worker."""
        return (record.node_id, record.device_id) if self.seen.starts_workers else ("", record.name)

    def _capacity(self, place: tuple[str, str]) -> int:
        """Experts that fit there beside the attention workers."""
        memory_bytes = self._memory_bytes(place)
        if self.seen.starts_workers:
            attention = [w for w in self.placed.values() if w.role == "attention" and w.place == place]
            memory_bytes -= sum(w.memory_bytes for w in attention)
        return max(0, memory_bytes) // self.terms.demand.expert_bytes

    def _memory_bytes(self, place: tuple[str, str]) -> int:
        if not self.seen.starts_workers:
            return self.seen.workers[place[1]].record.memory_bytes
        devices = ((node.id, device) for node in self.seen.topology.nodes for device in node.devices)
        return sum(device.memory_bytes for node_id, device in devices if (node_id, device.id) == place)

    def _takes_spare(self, worker_id: str) -> bool:
        """Whether the worker itself takes more than fits: it counts all that it holds and loads."""
        most_bytes = int(self._memory_bytes(self._place(self.experts[worker_id].record)) / MEMORY_SHARE) * LOAD_SHARE
        num_experts = len(self.held[worker_id] | self._promised(worker_id)) + SPARE_EXPERTS
        return num_experts * self.terms.demand.expert_bytes <= int(most_bytes)

    # --------------------------------------------------------------------------------------------------------- routes

    def send_routes(self) -> list[Action]:
        peers, owners, is_complete = self._route()
        version = self.terms.first_version + self.plan.num_sent
        route = Route(version=version, peers=peers, owners=owners)
        uses = self._uses(route)
        routes = dict(self.plan.routes)
        actions: list[Action] = []
        for name, worker in sorted(self.live.items()):
            worker_id = worker.record.worker_id
            sent = routes.get(worker_id, ())
            if worker.record.role == "attention" and self._is_due(worker, sent, route, uses, is_complete):
                routes[worker_id] = (*sent, SentRoute(route, uses, self.seen.now_s))
                actions.append(Send(name, worker_id, route))
        if actions:
            self.plan = replace(self.plan, routes=routes, num_sent=self.plan.num_sent + 1)
        return actions

    def _route(self) -> tuple[tuple[Peer, ...], tuple[tuple[tuple[int, ...], ...], ...], bool]:
        """Peers, owners, and whether each expert has one."""
        moe_layers = self.terms.shape.moe_layers
        chosen: list[list[list[str]]] = [[] for _ in range(self.terms.shape.num_layers)]
        for expert in self.all_experts:
            holders = sorted(self.routable[expert], key=lambda worker_id: self.experts[worker_id].record.name)
            wanted = [w for w in holders if expert in self.plan.shards.get(w, ())] or holders
            first = (expert.idx + expert.layer) % len(wanted) if wanted else 0  # copies take turns as the preferred one
            chosen[moe_layers[expert.layer]].append(wanted[first:] + wanted[:first])
        used = {worker_id for layer in chosen for owners in layer for worker_id in owners}
        ids = sorted(used, key=lambda worker_id: self.experts[worker_id].record.name)
        place_of = {worker_id: i for i, worker_id in enumerate(ids)}
        peers = [self.experts[worker_id].record for worker_id in ids]
        return (
            tuple(Peer(name=record.name, worker_id=record.worker_id, address=record.address) for record in peers),
            tuple(tuple(tuple(place_of[w] for w in owners) for owners in layer) for layer in chosen),
            all(owners for layer in chosen for owners in layer),
        )

    def _uses(self, route: Route) -> frozenset[tuple[str, Expert]]:
        ids = [peer.worker_id for peer in route.peers]
        return frozenset(
            (ids[place], Expert(row, i))
            for row, layer in enumerate(self.terms.shape.moe_layers)
            for i, owners in enumerate(route.owners[layer])
            for place in owners
        )

    def _is_due(
        self,
        worker: Seen,
        sent: tuple[SentRoute, ...],
        route: Route,
        uses: frozenset[tuple[str, Expert]],
        is_complete: bool,
    ) -> bool:
        if not sent:
            return is_complete
        last, report = sent[-1], _report(worker)
        if (last.route.peers, last.route.owners) == (route.peers, route.owners):
            is_broken = any(peer.worker_id in report.lost_peers for peer in route.peers) or bool(report.error)
            has_answered = report.route_version == last.route.version or bool(report.error)
            return is_broken and has_answered and self.seen.now_s - last.at_s > RETRY_S
        if not all(worker_id in self.routable[expert] for worker_id, expert in last.uses):
            return True
        if not is_complete:
            return False
        was_complete = len({expert for _, expert in last.uses}) == len(self.all_experts)
        return not was_complete or not any(map(self._is_loading, self.experts))

    # ---------------------------------------------------------------------------------------------------- assignments

    def uses(self) -> tuple[frozenset[tuple[str, Expert]], bool]:
        """What routes in use or under way name, and whether all those routes are known."""
        uses: set[tuple[str, Expert]] = set()
        is_known = True
        for worker in self.seen.workers.values():
            if worker.record.role == "attention" and worker.is_running:
                sent = self.plan.routes.get(worker.record.worker_id, ())
                uses.update(*(item.uses for item in sent))
                version = worker.report.route_version if worker.report is not None else None
                is_ours = not worker.is_adopted or any(item.route.version == version for item in sent)
                is_known = is_known and is_ours
        return frozenset(uses), is_known

    def send_assigns(self) -> list[Action]:
        actions: list[Action] = []
        assigns = dict(self.plan.assigns)
        num_sent = self.plan.num_sent
        uses, is_known = self.uses()
        room = self._room()
        for worker_id, worker in self.experts.items():
            target = self.plan.shards.get(worker_id)
            if target is None or worker_id in self.plan.stopped:
                continue
            sent = self._last_assign(worker_id)
            has = self.held[worker_id] | self._promised(worker_id)
            base = {expert for expert in has if not is_known or (worker_id, expert) in uses} | (target & has)
            new = sorted(target - base, key=lambda expert: (bool(self.holders[expert]), expert))
            place = self._place(worker.record)
            num_new = max(0, min(len(new), room[place]))
            if not num_new and room[place] <= 0 and not self._is_loading(worker_id) and self._takes_spare(worker_id):
                num_new = min(len(new), SPARE_EXPERTS)
            room[place] -= num_new
            experts = frozenset(base.union(new[:num_new]))
            if sent is None or sent.experts != experts or self._has_failed(worker, sent):
                version = self.terms.first_version + num_sent
                message = Assign(version=version, experts=self.terms.to_layers(experts))
                num_sent += 1
                assigns[worker_id] = (*assigns.get(worker_id, ()), SentAssign(message, experts, self.seen.now_s))
                actions.append(Send(worker.record.name, worker_id, message))
        self.plan = replace(self.plan, assigns=assigns, num_sent=num_sent)
        return actions

    def _last_assign(self, worker_id: str) -> SentAssign | None:
        return next(reversed(self.plan.assigns.get(worker_id, ())), None)

    def _promised(self, worker_id: str) -> Held:
        """What it was told to hold and may be loading."""
        sent = self._last_assign(worker_id)
        return sent.experts if sent is not None and self._is_loading(worker_id) else frozenset()

    def _kept(self, worker_id: str) -> Held:
        """What it holds and no order that may be under way lets it drop."""
        worker = self.experts[worker_id]
        sent = self.plan.assigns.get(worker_id, ())
        if worker.is_adopted and not any(item.message.version == _report(worker).assign_version for item in sent):
            return frozenset()  # it may be carrying out another controller's order
        return self.held[worker_id].intersection(*(item.experts for item in sent))

    def _is_loading(self, worker_id: str) -> bool:
        sent = self._last_assign(worker_id)
        return sent is not None and _report(self.experts[worker_id]).assign_version != sent.message.version

    def _has_failed(self, worker: Seen, sent: SentAssign) -> bool:
        report = _report(worker)
        is_late = self.seen.now_s - sent.at_s > RETRY_S
        return bool(report.error) and report.assign_version != sent.message.version and is_late

    def _room(self) -> dict[tuple[str, str], int]:
        """Experts that more could be loaded, by what shares one memory."""
        room: dict[tuple[str, str], int] = {}
        for worker in self.seen.workers.values():
            if worker.record.role == "expert" and worker.is_running:
                place = self._place(worker.record)
                room.setdefault(place, self._capacity(place))
                if worker.report is not None:
                    worker_id = worker.record.worker_id
                    promised = self._promised(worker_id) if worker_id in self.experts else frozenset()
                    room[place] -= len(self.terms.from_layers(worker.report.experts) | promised)
        return room

    # --------------------------------------------------------------------------------------------------------- status

    def problem(self) -> str | None:
        if self.plan.place_problem or self.plan.shards_problem:
            return self.plan.place_problem or self.plan.shards_problem
        for name, worker in sorted(self.live.items()):
            if error := _report(worker).error:
                return f"{name}: {error}"
        num_missing = sum(not self.holders[expert] for expert in self.all_experts)
        return f"{num_missing} of {len(self.all_experts)} experts are not held by any worker" if num_missing else None


def _report(worker: Seen) -> WorkerReport:
    assert worker.report is not None  # of a live worker
    return worker.report
