"""Which experts each live expert worker should hold. Pure.

Decided when workers come or go: after a loss at once, what nobody holds and no more. Once that is in place the shards
are made even to within `Demand.slack`, and after a while in which nothing has happened to within `FINE_SLACK`. Each is
done once for a set of workers, when all moves before it are over, so that nothing is moved to and fro; and a worker
that comes and goes again and again does not set off the last, which moves few experts for little.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cluster.control.balance import Expert, ShardProblem, assign
from cluster.control.plan import Held, Plan, Seen
from cluster.control.room import Room
from cluster.control.view import View

SETTLE_S = 10.0  # without a change, until what is a little uneven is evened out as well
FINE_SLACK = 0.01  # what is left is not worth a move


def decide_shards(view: View, room: Room) -> Plan:
    """The plan with the shards that there should be now."""
    plan = view.plan
    members = {worker_id: w for worker_id, w in view.experts.items() if view.is_placed(w.record)}
    slack = _slack_due(view, members)
    if slack is None:
        return plan
    slots = room.slots(members)
    missing = len(view.all_experts) - sum(slots.values())
    problem: str | None = None
    if missing > 0:
        problem = f"{missing} of {len(view.all_experts)} experts have no room on the {len(members)} expert workers"
        shards = {worker_id: plan.shards.get(worker_id, view.held[worker_id]) for worker_id in members}
    else:
        shards = _shared_out(view, members, slots, slack)
    ids = frozenset(members)
    reached = 0.0 if problem is not None else slack if ids == plan.shards_for else None
    return replace(
        plan,
        shards=shards,
        shards_for=ids,
        shards_slack=reached,
        shards_at_s=view.seen.now_s,
        shards_problem=problem,
    )


def _slack_due(view: View, members: Mapping[str, Seen]) -> float | None:
    """How uneven the shards may be that are to be decided now; None: those that there are stand."""
    plan, demand = view.plan, view.terms.demand
    if not view.all_experts:
        return None
    if frozenset(members) != plan.shards_for:
        # the first time: rather than load all on the first and move half of it, wait for the others
        is_first = plan.shards_for is None and not any(view.held.values())
        return None if is_first and view.are_more_experts_coming() else demand.slack
    if any(view.held[worker_id] != plan.shards.get(worker_id) or view.is_loading(worker_id) for worker_id in members):
        return None
    if plan.shards_slack is None:
        return demand.slack
    if plan.shards_slack <= FINE_SLACK or view.are_more_experts_coming():
        return None
    return FINE_SLACK if view.seen.now_s - plan.shards_at_s > SETTLE_S else None


def _shared_out(view: View, members: Mapping[str, Seen], slots: Mapping[str, int], slack: float) -> dict[str, Held]:
    demand = view.terms.demand
    domain_of = {node.id: node.failure_domain for node in view.seen.topology.nodes}
    domains = [domain_of.get(w.record.node_id, w.record.node_id) for w in members.values()]
    current: Sequence[Collection[Expert]] = _current(view, members, domains)
    # Where a worker holds more than its share, balance first and only then trim: what is trimmed is not chosen well
    roomy = [max(slots[worker_id], len(has)) for worker_id, has in zip(members, current, strict=True)]
    exact = [slots[worker_id] for worker_id in members]
    for num_slots in (roomy, exact):
        current = assign(ShardProblem(demand.load, num_slots, domains, demand.max_copies, slack), current)
    return {worker_id: frozenset(has) for worker_id, has in zip(members, current, strict=True)}


def _current(view: View, members: Mapping[str, Seen], domains: Sequence[str]) -> list[set[Expert]]:
    """What each has, or should have where no live one has it; of too many copies those that were planned."""
    domain_of = dict(zip(members, domains, strict=True))
    current: dict[str, set[Expert]] = {worker_id: set() for worker_id in members}
    planned = {worker_id: view.plan.shards.get(worker_id, frozenset()) for worker_id in members}
    for expert in view.all_experts:
        holders = [worker_id for worker_id in view.holders[expert] if worker_id in members]
        if not holders:
            holders = [worker_id for worker_id in members if expert in planned[worker_id]]
        taken: list[str] = []
        for worker_id in sorted(holders, key=lambda worker_id: expert not in planned[worker_id]):
            if len(taken) < view.terms.demand.max_copies and domain_of[worker_id] not in taken:
                taken.append(domain_of[worker_id])
                current[worker_id].add(expert)
    return list(current.values())
