"""What the controller tells people: `ClusterStatus` from what it observed and planned. Pure."""

from __future__ import annotations

import itertools
import time

import msgspec

from cluster.control.plan import Observed, Plan, Seen, Terms, is_live
from cluster.errors import PlacementError
from cluster.protocol import EngineState, Lead
from cluster.store.records import ClusterStatus, LeftOut, NodeStatus, StartFailure, WorkerStatus


def cluster_status(
    cluster: str,
    model: str,
    lead: Lead,
    terms: Terms,
    seen: Observed,
    plan: Plan,
    problem: str | None,
    failures: tuple[StartFailure, ...] = (),
) -> ClusterStatus:
    """Workers that should run and do not are "starting", or "lost" where they wait before the next try.

    `failures`: of those that were started again and again.
    """
    if plan.place_problem is not None:
        failures = (StartFailure(code=PlacementError.code, message=plan.place_problem), *failures)
    workers = [_worker_status(terms, worker) for worker in seen.workers.values()]
    placed = plan.placement.workers if plan.placement is not None else ()
    workers += [
        WorkerStatus(
            name=worker.id,
            role=worker.role,
            node_id=worker.node_id,
            address="",
            pid=0,
            condition="lost" if worker.id in seen.resting else "starting",
        )
        for worker in placed
        if worker.id not in seen.workers
    ]
    there = {node.id for node in seen.topology.nodes}
    gone = sorted({worker.node_id for worker in workers} - there)
    return ClusterStatus(
        cluster=cluster,
        model=model,
        epoch=lead.epoch,
        controller_id=lead.controller_id,
        at_s=time.time(),
        num_layers=terms.shape.num_layers,
        num_experts=terms.shape.num_experts,
        nodes=(
            *(
                NodeStatus(
                    node_id=node.id,
                    memory_bytes=sum(device.memory_bytes for device in node.compute_devices),
                    devices=tuple(device.id for device in node.compute_devices),
                )
                for node in seen.topology.nodes
            ),
            *(NodeStatus(node_id=node_id, memory_bytes=0, is_alive=False) for node_id in gone),
        ),
        workers=tuple(sorted(workers, key=lambda worker: (worker.role, len(worker.name), worker.name))),
        problem=problem,
        failures=failures,
        left_out=_left_out(terms, seen, plan),
    )


def _left_out(terms: Terms, seen: Observed, plan: Plan) -> tuple[LeftOut, ...]:
    if plan.placement is None or plan.place_problem is not None:
        return ()
    size = terms.demand.expert_bytes
    placed = {(worker.id, worker.node_id) for worker in plan.placement.workers}
    found: list[LeftOut] = []
    for name, worker in seen.workers.items():
        record = worker.record
        if (name, record.node_id) not in placed:
            found.append(
                LeftOut(worker=name, reason="it has no place any more, and ends when nobody asks it for experts")
            )
        elif record.role == "expert" and record.memory_bytes < size:
            reason = (
                f"it has room for {record.memory_bytes} bytes of experts, and one takes {size}: give it more memory"
            )
            found.append(LeftOut(worker=name, reason=reason))
    if seen.starts_workers:
        reason = f"beside the other workers no node has room for another one's first expert ({size} bytes): add memory"
        experts = plan.placement.of_role("expert")
        missing = max(0, terms.demand.num_expert_workers - len(experts))
        used = seen.workers.keys() | {worker.id for worker in experts}
        unused = (name for index in itertools.count() if (name := f"expert-{index}") not in used)
        found += [LeftOut(worker=name, reason=reason) for name in itertools.islice(unused, missing)]
    return tuple(found)


def conditions(status: ClusterStatus) -> ClusterStatus:
    """The status without what changes all the time."""
    workers = tuple(msgspec.structs.replace(worker, state=EngineState()) for worker in status.workers)
    return msgspec.structs.replace(status, at_s=0.0, workers=workers)


def _worker_status(terms: Terms, worker: Seen) -> WorkerStatus:
    record, report = worker.record, worker.report
    shards = report.experts if report is not None else ()
    is_new = report is None and worker.is_running and worker.silent_s <= terms.lease_s
    return WorkerStatus(
        name=record.name,
        role=record.role,
        node_id=record.node_id,
        address=record.address,
        pid=record.pid,
        condition="serving" if is_live(terms, worker) else "starting" if is_new else "lost",
        num_experts=sum(map(len, shards)),
        shards=shards,
        state=report.state if report is not None else EngineState(),
    )
