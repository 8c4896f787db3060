"""What an observation means beside the plan: who lives, who holds which experts, what is under way. Pure."""

from __future__ import annotations

from collections import defaultdict

from cluster.control.balance import Expert
from cluster.control.plan import Held, Observed, Plan, Seen, SentAssign, Terms, is_live
from cluster.protocol import WorkerReport
from cluster.store.records import WorkerRecord


class View:
    """What one call of `reconcile` decides by; `plan` is as it was before the call sent anything."""

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
        self.held = {worker_id: terms.from_layers(report_of(w).experts) for worker_id, w in self.experts.items()}
        self.holders: dict[Expert, list[str]] = defaultdict(list)  # worker ids
        for worker_id, held in self.held.items():
            for expert in held:
                self.holders[expert].append(worker_id)
        self.routable: dict[Expert, list[str]] = defaultdict(list)  # worker ids that a new route may name
        for worker_id in self.experts:
            for expert in self._kept(worker_id):
                self.routable[expert].append(worker_id)
        self.all_experts = [Expert(row, i) for row, load in enumerate(terms.demand.load) for i in range(len(load))]

    def is_placed(self, record: WorkerRecord) -> bool:
        return (record.name, record.node_id) in self.placed

    def last_assign(self, worker_id: str) -> SentAssign | None:
        return next(reversed(self.plan.assigns.get(worker_id, ())), None)

    def is_loading(self, worker_id: str) -> bool:
        sent = self.last_assign(worker_id)
        return sent is not None and report_of(self.experts[worker_id]).assign_version != sent.message.version

    def promised(self, worker_id: str) -> Held:
        """What it was told to hold and may be loading."""
        sent = self.last_assign(worker_id)
        return sent.experts if sent is not None and self.is_loading(worker_id) else frozenset()

    def are_more_experts_coming(self) -> bool:
        """Whether expert workers are on their way that have not failed yet."""
        names = {worker.record.name for worker in self.experts.values()}
        coming = {w.id for w in self.placed.values() if w.role == "expert"} - names - self.seen.resting
        return bool(coming) or self.seen.num_experts_awaited > 0

    def _kept(self, worker_id: str) -> Held:
        """What it holds and no order that may be under way lets it drop."""
        worker = self.experts[worker_id]
        sent = self.plan.assigns.get(worker_id, ())
        if worker.is_adopted and not any(item.message.version == report_of(worker).assign_version for item in sent):
            return frozenset()  # it may be carrying out another controller's order
        return self.held[worker_id].intersection(*(item.experts for item in sent))


def report_of(worker: Seen) -> WorkerReport:
    """The last report of a live worker."""
    assert worker.report is not None
    return worker.report
