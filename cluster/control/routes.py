"""Where attention workers find experts: routes that name only what live workers report that they hold. Pure."""

from __future__ import annotations

from dataclasses import replace

from cluster.control.balance import Expert
from cluster.control.plan import Plan, Seen, Send, SentRoute
from cluster.control.view import View, report_of
from cluster.protocol import Peer, Route

RETRY_S = 2.0  # before a route that broke is sent again

Uses = frozenset[tuple[str, Expert]]  # (worker id, expert)


def send_routes(view: View, plan: Plan) -> tuple[Plan, list[Send]]:
    """A new route to each attention worker that needs one, and the plan with those sent."""
    route, is_complete = _route(view, plan)
    uses = _uses(view, route)
    routes = dict(plan.routes)
    actions: list[Send] = []
    for name, worker in sorted(view.live.items()):
        worker_id = worker.record.worker_id
        sent = routes.get(worker_id, ())
        if worker.record.role == "attention" and _is_due(view, worker, sent, route, uses, is_complete):
            routes[worker_id] = (*sent, SentRoute(route, uses, view.seen.now_s))
            actions.append(Send(name, worker_id, route))
    if actions:
        plan = replace(plan, routes=routes, num_sent=plan.num_sent + 1)
    return plan, actions


def routes_in_use(view: View, plan: Plan) -> tuple[Uses, bool]:
    """What routes in use or under way name, and whether all those routes are known."""
    uses: set[tuple[str, Expert]] = set()
    is_known = True
    for worker in view.seen.workers.values():
        if worker.record.role == "attention" and worker.is_running:
            sent = plan.routes.get(worker.record.worker_id, ())
            uses.update(*(item.uses for item in sent))
            version = worker.report.route_version if worker.report is not None else None
            is_ours = not worker.is_adopted or any(item.route.version == version for item in sent)
            is_known = is_known and is_ours
    return frozenset(uses), is_known


def _route(view: View, plan: Plan) -> tuple[Route, bool]:
    """The best route that there is now, and whether each expert has an owner in it."""
    moe_layers = view.terms.shape.moe_layers
    chosen: list[list[list[str]]] = [[] for _ in range(view.terms.shape.num_layers)]
    for expert in view.all_experts:
        holders = sorted(view.routable[expert], key=lambda worker_id: view.experts[worker_id].record.name)
        wanted = [w for w in holders if expert in plan.shards.get(w, ())] or holders
        first = (expert.idx + expert.layer) % len(wanted) if wanted else 0  # copies take turns as the preferred one
        chosen[moe_layers[expert.layer]].append(wanted[first:] + wanted[:first])
    used = {worker_id for layer in chosen for owners in layer for worker_id in owners}
    ids = sorted(used, key=lambda worker_id: view.experts[worker_id].record.name)
    place_of = {worker_id: i for i, worker_id in enumerate(ids)}
    peers = [view.experts[worker_id].record for worker_id in ids]
    route = Route(
        version=view.terms.first_version + plan.num_sent,
        peers=tuple(Peer(name=record.name, worker_id=record.worker_id, address=record.address) for record in peers),
        owners=tuple(tuple(tuple(place_of[w] for w in owners) for owners in layer) for layer in chosen),
    )
    return route, all(owners for layer in chosen for owners in layer)


def _uses(view: View, route: Route) -> Uses:
    ids = [peer.worker_id for peer in route.peers]
    return frozenset(
        (ids[place], Expert(row, i))
        for row, layer in enumerate(view.terms.shape.moe_layers)
        for i, owners in enumerate(route.owners[layer])
        for place in owners
    )


def _is_due(view: View, worker: Seen, sent: tuple[SentRoute, ...], route: Route, uses: Uses, is_complete: bool) -> bool:
    if not sent:
        return is_complete
    last, report = sent[-1], report_of(worker)
    if (last.route.peers, last.route.owners) == (route.peers, route.owners):
        is_broken = any(peer.worker_id in report.lost_peers for peer in route.peers) or bool(report.error)
        has_answered = report.route_version == last.route.version or bool(report.error)
        return is_broken and has_answered and view.seen.now_s - last.at_s > RETRY_S
    if not all(worker_id in view.routable[expert] for worker_id, expert in last.uses):
        return True
    if not is_complete:
        return False
    was_complete = len({expert for _, expert in last.uses}) == len(view.all_experts)
    return not was_complete or not any(map(view.is_loading, view.experts))
