"""What expert workers are told to hold: what they should, and what routes in use still find there. Pure."""

from __future__ import annotations

from dataclasses import replace

from cluster.control.plan import Plan, Seen, Send, SentAssign
from cluster.control.room import SPARE_EXPERTS, Room
from cluster.control.routes import routes_in_use
from cluster.control.view import View, report_of
from cluster.protocol import Assign

RETRY_S = 2.0  # before an assignment that failed is sent again


def send_assigns(view: View, room: Room, plan: Plan) -> tuple[Plan, list[Send]]:
    """A new assignment to each expert worker that needs one, and the plan with those sent."""
    actions: list[Send] = []
    assigns = dict(plan.assigns)
    num_sent = plan.num_sent
    uses, is_known = routes_in_use(view, plan)
    left = room.left()
    for worker_id, worker in view.experts.items():
        target = plan.shards.get(worker_id)
        if target is None or worker_id in plan.stopped:
            continue
        sent = view.last_assign(worker_id)
        has = view.held[worker_id] | view.promised(worker_id)
        base = {expert for expert in has if not is_known or (worker_id, expert) in uses} | (target & has)
        new = sorted(target - base, key=lambda expert: (bool(view.holders[expert]), expert))
        place = room.place_of(worker.record)
        num_new = max(0, min(len(new), left[place]))
        if not num_new and left[place] <= 0 and not view.is_loading(worker_id) and room.takes_spare(worker_id):
            num_new = min(len(new), SPARE_EXPERTS)
        left[place] -= num_new
        experts = frozenset(base.union(new[:num_new]))
        if sent is None or sent.experts != experts or _has_failed(view, worker, sent):
            message = Assign(version=view.terms.first_version + num_sent, experts=view.terms.to_layers(experts))
            num_sent += 1
            assigns[worker_id] = (*assigns.get(worker_id, ()), SentAssign(message, experts, view.seen.now_s))
            actions.append(Send(worker.record.name, worker_id, message))
    return replace(plan, assigns=assigns, num_sent=num_sent), actions


def _has_failed(view: View, worker: Seen, sent: SentAssign) -> bool:
    report = report_of(worker)
    is_late = view.seen.now_s - sent.at_s > RETRY_S
    return bool(report.error) and report.assign_version != sent.message.version and is_late
