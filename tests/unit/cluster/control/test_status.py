from __future__ import annotations

from dataclasses import replace

import msgspec

from cluster.control.status import cluster_status, conditions
from cluster.protocol import EngineState, Lead
from cluster.store.records import ClusterStatus, StartFailure
from tests.support.simulated_cluster import NUM_EXPERTS, TERMS, SimulatedCluster, node


def _status(cluster: SimulatedCluster) -> ClusterStatus:
    lead = Lead(epoch=3, controller_id="c")
    return cluster_status("name", "model", lead, cluster.terms, cluster.observed(), cluster.plan, "a problem")


def _conditions(cluster: SimulatedCluster) -> dict[str, str]:
    return {worker.name: worker.condition for worker in _status(cluster).workers}


def test_workers_are_starting_then_serving_then_lost() -> None:
    cluster = SimulatedCluster(0, [node("a"), node("b")])
    cluster.step()
    assert set(_conditions(cluster).values()) == {"starting"}
    cluster.run(10.0)
    assert set(_conditions(cluster).values()) == {"serving"}
    cluster.hang("expert-1", 100.0)
    cluster.run(2.0)
    assert _conditions(cluster)["expert-1"] == "lost"


def test_it_shows_who_leads_what_is_held_and_where() -> None:
    cluster = SimulatedCluster(0, [node("a"), node("b", 2000)])
    cluster.run(10.0)
    status = _status(cluster)
    assert (status.cluster, status.model, status.epoch, status.controller_id) == ("name", "model", 3, "c")
    assert status.problem == "a problem"
    assert [(n.node_id, n.memory_bytes, n.is_alive) for n in status.nodes] == [("a", 1000, True), ("b", 2000, True)]
    assert sum(worker.num_experts for worker in status.workers) == NUM_EXPERTS
    for worker in status.workers:
        assert worker.num_experts == sum(map(len, worker.shards))


def test_a_node_that_is_gone_is_shown_while_its_workers_are() -> None:
    cluster = SimulatedCluster(0, [node("a"), node("b", 200)])
    cluster.run(10.0)
    cluster.lost_nodes.add("b")
    status = _status(cluster)
    assert {n.node_id: n.is_alive for n in status.nodes} == {"a": True, "b": False}


def test_expert_workers_that_find_no_room_are_left_out_with_the_reason() -> None:
    demand = replace(TERMS.demand, num_expert_workers=NUM_EXPERTS + 2)
    nodes = [node("a", 120), node("b", 120), node("c", NUM_EXPERTS * TERMS.demand.expert_bytes)]
    cluster = SimulatedCluster(0, nodes, replace(TERMS, demand=demand))
    cluster.step()
    left_out = {found.worker: found.reason for found in _status(cluster).left_out}
    assert left_out.keys() == {f"expert-{NUM_EXPERTS}", f"expert-{NUM_EXPERTS + 1}"}
    assert all("no node has room for another one's first expert (10 bytes)" in reason for reason in left_out.values())


def test_a_worker_that_has_lost_its_place_is_left_out_until_it_is_gone() -> None:
    cluster = SimulatedCluster(0, [node("a"), node("b")])
    cluster.run(10.0)
    assert _status(cluster).left_out == ()
    placement = cluster.plan.placement
    assert placement is not None
    others = tuple(worker for worker in placement.workers if worker.id != "expert-1")
    cluster.plan = replace(cluster.plan, placement=replace(placement, workers=others))
    (left_out, wanted) = _status(cluster).left_out
    assert (left_out.worker, wanted.worker) == ("expert-1", "expert-2")
    assert "it has no place any more" in left_out.reason


def test_a_pod_without_room_for_one_expert_is_left_out() -> None:
    cluster = SimulatedCluster(0, [node("a"), node("b")])
    cluster.run(10.0)
    small = cluster.processes["expert-1"]
    small.record = msgspec.structs.replace(small.record, memory_bytes=9)
    seen = replace(cluster.observed(), starts_workers=False)
    status = cluster_status("name", "model", Lead(epoch=3, controller_id="c"), cluster.terms, seen, cluster.plan, None)
    (left_out,) = status.left_out
    assert (left_out.worker, "has room for 9 bytes of experts" in left_out.reason) == ("expert-1", True)


def test_conditions_leave_out_what_changes_all_the_time() -> None:
    cluster = SimulatedCluster(0, [node("a"), node("b")])
    cluster.run(10.0)
    status = _status(cluster)
    busy = tuple(msgspec.structs.replace(worker, state=EngineState(steps=9)) for worker in status.workers)
    assert conditions(msgspec.structs.replace(status, at_s=9.0, workers=busy)) == conditions(status)
    other = msgspec.structs.replace(status, problem=None)
    assert conditions(other) != conditions(status)


def test_what_keeps_the_cluster_from_coming_up_stands_in_a_field_of_its_own() -> None:
    cluster = SimulatedCluster(0, [node("a", 10)])
    cluster.step()
    lead, refused = (
        Lead(epoch=3, controller_id="c"),
        StartFailure(code="start_refused", message="why", worker="expert-0"),
    )
    status = cluster_status("name", "model", lead, TERMS, cluster.observed(), cluster.plan, None, (refused,))
    no_room, other = status.failures
    assert (no_room.code, no_room.worker) == ("placement_impossible", "")
    assert no_room.message == cluster.plan.place_problem
    assert other == refused
