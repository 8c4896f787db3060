"""What to do next: one pure function from what is observed and what was planned to actions and the next plan.

The controller calls it again and again, so each call does only the next step towards the goal. Three things are kept
apart. *Starts*: who should run where, `place()` over the nodes that there are. *Shards*: which experts each live
expert worker should hold; decided again whenever one joins or is lost, so that what nobody holds is assigned at once.
*Routes*: where attention workers find experts, which names only what live workers report that they hold.

Experts move without a gap: load at the new place, route there, and only when no attention worker uses a route to the
old place any more, drop there. An `Assign` therefore has what is wanted and what is still in use.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.control.assigns import send_assigns
from cluster.control.placement import PlacedWorker, Placement, place
from cluster.control.plan import (
    Action,
    Decision,
    End,
    Forget,
    Observed,
    Plan,
    SentAssign,
    SentRoute,
    Start,
    Terms,
    is_hung,
    placement_of,
)
from cluster.control.room import Room
from cluster.control.routes import routes_in_use, send_routes
from cluster.control.shards import decide_shards
from cluster.control.view import View, report_of
from cluster.errors import PlacementError
from cluster.store.records import WorkerRecord


def reconcile(terms: Terms, seen: Observed, plan: Plan) -> Decision:
    """The next step. `Forget` takes effect before the next call; a `Send` repeats nothing that was sent."""
    view = View(terms, seen, _placed(terms, seen, _pruned(seen, plan)))
    room = Room(view)
    plan = decide_shards(view, room)
    plan, routes = send_routes(view, plan)
    plan, assigns = send_assigns(view, room, plan)
    plan, processes = _start_and_end(view, plan) if seen.starts_workers else (plan, [])
    return Decision(plan, (*processes, *assigns, *routes), _problem(view, plan))


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


def _start_and_end(view: View, plan: Plan) -> tuple[Plan, list[Action]]:
    actions: list[Action] = []
    nodes = {node.id for node in view.seen.topology.nodes}
    for worker in view.seen.workers.values():
        record = worker.record
        is_silent = is_hung(view.terms, worker)
        if not worker.is_running or (is_silent and record.node_id not in nodes):
            actions.append(Forget(record))
        elif is_silent:
            actions.append(End(record, kill=True))
        elif not view.is_placed(record) and record.worker_id not in plan.stopped and not _is_used(view, plan, record):
            plan = replace(plan, stopped=plan.stopped | {record.worker_id})
            actions.append(End(record, kill=False))
    busy = view.seen.workers.keys() | view.seen.starting | view.seen.resting
    starts = [w for w in view.placed.values() if w.id not in busy and w.node_id in nodes]
    return plan, [*actions, *map(Start, starts)]


def _is_used(view: View, plan: Plan, record: WorkerRecord) -> bool:
    """Whether an attention worker may still ask it for experts."""
    if record.role != "expert":
        return False
    uses, is_known = routes_in_use(view, plan)
    return not is_known or any(worker_id == record.worker_id for worker_id, _ in uses)


def _problem(view: View, plan: Plan) -> str | None:
    if plan.place_problem or plan.shards_problem:
        return plan.place_problem or plan.shards_problem
    for name, worker in sorted(view.live.items()):
        if error := report_of(worker).error:
            return f"{name}: {error}"
    num_missing = sum(not view.holders[expert] for expert in view.all_experts)
    return f"{num_missing} of {len(view.all_experts)} experts are not held by any worker" if num_missing else None
