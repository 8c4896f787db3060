from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest

from cluster.control.balance import Expert
from cluster.control.plan import End, Forget, Send, Start
from cluster.protocol import Assign, Route
from tests.support.simulated_cluster import DEMAND, NUM_EXPERTS, SHAPE, STEP_S, TERMS, SimulatedCluster, node

CONVERGE_S = 60.0


def _nodes(num: int = 3, memory_bytes: int = 1000) -> list:
    return [node(f"n{i}", memory_bytes) for i in range(num)]


def _converged(cluster: SimulatedCluster, within_s: float = CONVERGE_S) -> float:
    """Seconds until nothing is left to do."""
    for i in range(round(within_s / STEP_S)):
        if cluster.is_converged():
            return i * STEP_S
        cluster.step()
    raise AssertionError(f"not converged: {cluster.decision}")


def _up(seed: int = 0, num_nodes: int = 3, **terms: object) -> SimulatedCluster:
    cluster = SimulatedCluster(seed, _nodes(num_nodes), replace(TERMS, **terms))
    _converged(cluster)
    return cluster


def _num_held(cluster: SimulatedCluster) -> list[int]:
    return sorted(len(process.held) for process in cluster.experts())


def _is_balanced(cluster: SimulatedCluster) -> bool:
    """In each layer no worker has more than the even part and one expert."""
    workers = cluster.experts()
    return all(
        sum(expert.layer == row for expert in process.held) <= -(-SHAPE.num_experts // len(workers)) + 1
        for process in workers
        for row in range(len(SHAPE.moe_layers))
    )


def test_a_new_cluster_comes_up_and_each_expert_is_loaded_once() -> None:
    cluster = SimulatedCluster(0, _nodes())
    first = cluster.step()
    assert sorted(a.worker.id for a in first.actions if isinstance(a, Start)) == [
        "attention-0",
        "attention-1",
        "expert-0",
        "expert-1",
    ]
    sent: list[Assign] = []
    while not cluster.is_converged():
        sent += [a.message for a in cluster.step().actions if isinstance(a, Send) and isinstance(a.message, Assign)]
        assert cluster.now_s < CONVERGE_S
    assert len(sent) == 2  # neither got more at first than it keeps
    assert _num_held(cluster) == [NUM_EXPERTS // 2, NUM_EXPERTS // 2]
    assert _is_balanced(cluster)


def test_when_all_is_as_it_should_be_nothing_is_done() -> None:
    cluster = _up()
    assert all(not cluster.step().actions for _ in range(100))


def test_a_lost_workers_experts_are_assigned_at_once_and_shared_out_again_after_its_restart() -> None:
    cluster = _up()
    lost = cluster.processes["expert-0"].record
    cluster.kill("expert-0")
    actions = cluster.step().actions
    assert Forget(lost) in actions
    assigns = [a for a in actions if isinstance(a, Send) and isinstance(a.message, Assign)]
    assert [a.name for a in assigns] == ["expert-1"]
    assert len(TERMS.from_layers(assigns[0].message.experts)) == NUM_EXPERTS
    _converged(cluster)
    again = cluster.processes["expert-0"].record
    assert (again.node_id, again.name) == (lost.node_id, lost.name)
    assert again.worker_id != lost.worker_id
    assert _num_held(cluster) == [NUM_EXPERTS // 2, NUM_EXPERTS // 2]
    assert _is_balanced(cluster)


def test_a_route_leaves_a_lost_worker_out_before_another_has_its_experts() -> None:
    cluster = _up()
    cluster.load_s = (5.0, 5.0)
    cluster.kill("expert-0")
    routes = [a.message for a in cluster.step().actions if isinstance(a, Send) and isinstance(a.message, Route)]
    assert len(routes) == 2
    assert {peer.name for peer in routes[0].peers} == {"expert-1"}


def test_a_silent_worker_is_lost_then_killed_and_started_again() -> None:
    cluster = _up()
    first = cluster.processes["expert-0"].record
    cluster.hang("expert-0", 1000.0)
    cluster.run(1.2)
    assert len(cluster.plan.shards) == 1 or first.worker_id not in (cluster.plan.shards_for or ())
    assert cluster.processes["expert-0"].is_alive
    ends = []
    while cluster.processes.get("expert-0") and cluster.processes["expert-0"].record == first:
        ends += [a for a in cluster.step().actions if isinstance(a, End)]
        assert cluster.now_s < CONVERGE_S
    assert ends == [End(first, kill=True)]
    _converged(cluster)
    assert _is_balanced(cluster)


def test_a_worker_that_was_silent_for_a_moment_gets_its_experts_back_without_a_restart() -> None:
    cluster = _up()
    num_started = cluster.num_started
    cluster.hang("expert-0", 2.0)
    cluster.run(3.0)
    _converged(cluster)
    assert cluster.num_started == num_started
    assert _is_balanced(cluster)


def test_a_lost_attention_worker_is_started_again_and_gets_a_route() -> None:
    cluster = _up()
    cluster.kill("attention-1")
    _converged(cluster)
    assert cluster.processes["attention-1"].route is not None
    assert all(not cluster.step().actions for _ in range(5))


def test_workers_of_a_node_that_is_gone_are_placed_elsewhere_under_other_names() -> None:
    cluster = _up()
    gone = cluster.processes["expert-0"].record.node_id
    on_it = {name for name, process in cluster.processes.items() if process.record.node_id == gone}
    cluster.lose_node(gone)
    _converged(cluster)
    assert not on_it & cluster.processes.keys()
    assert all(process.record.node_id != gone for process in cluster.processes.values())
    cluster.return_node(gone)
    _converged(cluster)


def test_what_does_not_fit_is_a_problem_and_what_runs_is_kept() -> None:
    cluster = SimulatedCluster(0, _nodes(2, 230))
    _converged(cluster)
    cluster.lose_node("n1")
    for _ in range(100):
        decision = cluster.step()
    assert "attention worker 2 of 2" in str(decision.problem)
    assert cluster.attention()
    cluster.return_node("n1")
    _converged(cluster)


def test_a_model_that_never_fits_starts_nothing() -> None:
    cluster = SimulatedCluster(0, _nodes(1, 50))
    decision = cluster.step()
    assert decision.actions == ()
    assert "attention worker 1 of 2" in str(decision.problem)


def test_full_workers_exchange_experts_a_few_at_a_time() -> None:
    """Room for exactly all experts: one of two workers must still be able to come back."""
    num_each = NUM_EXPERTS // 2
    nodes = [node("a0", 140), node("a1", 140), node("e0", num_each * 10), node("e1", num_each * 10)]
    cluster = SimulatedCluster(0, nodes)
    _converged(cluster)
    assert _num_held(cluster) == [num_each, num_each]
    cluster.kill("expert-0")
    decision = cluster.step()
    assert f"{num_each} of {NUM_EXPERTS} experts have no room" in str(decision.problem)
    _converged(cluster)
    assert _num_held(cluster) == [num_each, num_each]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("expert_bytes", [1, 33])
@pytest.mark.parametrize("extra", [0, 1, 5, NUM_EXPERTS])
def test_what_is_assigned_never_exceeds_what_a_worker_loads(num_workers: int, expert_bytes: int, extra: int) -> None:
    """Devices full to the brim, or with room for a few experts more; then all workers but one are lost.

    The simulated cluster checks each assignment as the worker itself does.
    """
    alone = 100_000  # an attention worker finds room on a node of its own only
    demand = replace(DEMAND, expert_bytes=expert_bytes, num_expert_workers=num_workers, attention_bytes=alone)
    shape = msgspec.structs.replace(SHAPE, expert_bytes=expert_bytes)
    num_each = -(-NUM_EXPERTS // num_workers) + extra
    rooms = [num_each * expert_bytes] * num_workers
    nodes = [node(f"a{i}", alone + 20) for i in range(2)] + [node(f"e{i}", room) for i, room in enumerate(rooms)]
    cluster = SimulatedCluster(extra, nodes, replace(TERMS, demand=demand, shape=shape))
    _converged(cluster)
    for survivor in sorted(process.record.name for process in cluster.experts()):
        for process in cluster.experts():
            if process.record.name != survivor:
                cluster.kill(process.record.name)
        _converged(cluster)
    assert sum(_num_held(cluster)) == NUM_EXPERTS


@pytest.mark.parametrize(("num_workers", "exchange"), [(2, True), (3, False)])
def test_full_workers_take_one_more_only_where_that_is_within_their_limit(num_workers: int, exchange: bool) -> None:
    """Each holds whole layers, which is as unbalanced as can be; a ninth more may be loaded than what fits."""
    num_each = NUM_EXPERTS // num_workers
    demand = replace(DEMAND, num_expert_workers=num_workers, attention_bytes=1000)
    nodes = [node(f"a{i}", 1020) for i in range(2)] + [node(f"e{i}", num_each * 10) for i in range(num_workers)]
    cluster = SimulatedCluster(0, nodes, replace(TERMS, demand=demand))
    _converged(cluster)
    in_order = [Expert(row, i) for row in range(len(SHAPE.moe_layers)) for i in range(SHAPE.num_experts)]
    for k, process in enumerate(cluster.experts()):
        process.held = frozenset(in_order[k * num_each : (k + 1) * num_each])
    for process in cluster.attention():
        process.route = None
    cluster.new_controller(epoch=2)
    _converged(cluster)
    assert _num_held(cluster) == [num_each] * num_workers
    assert _is_balanced(cluster) is exchange


def test_with_replicas_a_lost_workers_experts_are_routed_to_the_others_at_once() -> None:
    cluster = _up(demand=replace(DEMAND, max_copies=2))
    assert _num_held(cluster) == [NUM_EXPERTS, NUM_EXPERTS]
    cluster.kill("expert-1")
    actions = cluster.step().actions
    routes = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Route)]
    assert len(routes) == 2
    assert all(owners == (0,) for row in SHAPE.moe_layers for owners in routes[0].owners[row])


def test_copies_take_turns_as_the_preferred_one() -> None:
    cluster = _up(demand=replace(DEMAND, max_copies=2))
    route = cluster.attention()[0].route
    assert route is not None
    first = Counter(owners[0] for layer in SHAPE.moe_layers for owners in route.owners[layer])
    assert first[0] == first[1]


def test_a_dense_model_has_attention_workers_only() -> None:
    shape = msgspec.structs.replace(SHAPE, moe_layers=(), num_experts=0)
    demand = replace(DEMAND, load=(), num_expert_workers=0)
    cluster = SimulatedCluster(0, _nodes(), replace(TERMS, shape=shape, demand=demand))
    cluster.run(5.0)
    assert sorted(cluster.processes) == ["attention-0", "attention-1"]
    assert all(process.route is not None and not process.route.peers for process in cluster.attention())
    assert cluster.decision is not None
    assert cluster.decision.problem is None


def test_a_new_controller_takes_over_without_a_start_a_load_or_a_drop() -> None:
    cluster = _up()
    held = {name: process.held for name, process in cluster.processes.items()}
    num_started = cluster.num_started
    cluster.new_controller(epoch=2)
    _converged(cluster)
    assert cluster.num_started == num_started
    assert {name: process.held for name, process in cluster.processes.items()} == held


def test_while_another_controllers_route_may_be_in_use_nothing_is_dropped() -> None:
    cluster = _up()
    cluster.kill("expert-0")
    cluster.run(1.0)  # expert-1 holds all, expert-0 is back or about to be
    cluster.hang("attention-0", 4.0)
    cluster.new_controller(epoch=2)
    cluster.run(3.0)
    holder = cluster.processes["expert-1"]
    assert len(holder.held) == NUM_EXPERTS
    _converged(cluster)
    assert _is_balanced(cluster)


def test_starts_that_fail_again_and_again_become_rare() -> None:
    cluster = _up()
    cluster.start_failure = 1.0
    cluster.starts.clear()
    cluster.kill("expert-0")
    cluster.run(100.0)
    assert 4 <= len(cluster.starts) <= 8
    assert [failure.worker for failure in cluster.restarts.failures()] == ["expert-0"]
    cluster.start_failure = 0.0
    _converged(cluster)
    assert cluster.restarts.failures() == ()


def test_an_assignment_that_failed_is_sent_again_later_under_a_new_version() -> None:
    cluster = _up()
    cluster.load_s, cluster.start_s = (1000.0, 1000.0), (20.0, 20.0)
    cluster.kill("expert-0")
    sent: list[tuple[float, int]] = []
    for _ in range(50):
        for action in cluster.step().actions:
            if isinstance(action, Send) and action.name == "expert-1":
                sent.append((cluster.now_s, action.message.version))
        cluster.errors["expert-1"] = "a disk broke"
    assert cluster.decision is not None
    assert cluster.decision.problem == "expert-1: a disk broke"
    pauses = [after[0] - before[0] for before, after in pairwise(sent)]
    assert [version for _, version in sent] == sorted({version for _, version in sent})
    assert len(pauses) == 2
    assert min(pauses) > 2.0
    cluster.load_s = (0.0, 0.1)
    for process in cluster.processes.values():
        process.orders = [(cluster.now_s, order) for _, order in process.orders]
    cluster.errors.clear()
    _converged(cluster)


@pytest.mark.parametrize("seed", range(25))
def test_faults_at_random_break_no_promise_and_when_they_stop_all_is_well_again(seed: int) -> None:
    """The simulated cluster checks in each step that no route's expert is dropped and none is left unassigned."""
    copies = 1 + seed % 2
    demand = replace(DEMAND, num_expert_workers=2 + seed % 3, max_copies=copies)
    cluster = SimulatedCluster(seed, _nodes(4), replace(TERMS, demand=demand))
    chance = cluster.random
    cluster.load_s = (0.0, chance.choice((0.2, 1.0, 4.0)))
    cluster.report_loss = chance.choice((0.0, 0.1, 0.5))
    cluster.start_failure = chance.choice((0.0, 0.3))
    epoch = 1
    for _ in range(600):
        cluster.step()
        if not cluster.processes or chance.random() > 0.06:
            continue
        name = chance.choice(sorted(cluster.processes))
        fault = chance.choice(("kill", "kill", "hang", "hang", "node", "controller"))
        if fault == "kill":
            cluster.kill(name)
        elif fault == "hang":
            cluster.hang(name, chance.uniform(0.5, 8.0))
        elif fault == "controller":
            epoch += 1
            cluster.new_controller(epoch)
        elif cluster.lost_nodes:
            cluster.return_node(chance.choice(sorted(cluster.lost_nodes)))
        else:
            cluster.lose_node(chance.choice(sorted(cluster.nodes)))
    for name in sorted(cluster.lost_nodes):
        cluster.return_node(name)
    cluster.report_loss = cluster.start_failure = 0.0
    _converged(cluster, 120.0)
    assert _is_balanced(cluster) or copies > 1
    assert sum(_num_held(cluster)) >= NUM_EXPERTS
    if copies == 1:
        assert sum(_num_held(cluster)) == NUM_EXPERTS
