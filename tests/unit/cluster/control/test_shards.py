"""How even shards become, and when: see `test_reconcile` for what must hold meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from cluster.control.balance import Expert
from cluster.control.plan import Send
from cluster.control.shards import FINE_SLACK, SETTLE_S
from cluster.protocol import Assign
from tests.support.simulated_cluster import DEMAND, SHAPE, STEP_S, TERMS, SimulatedCluster, node

CONVERGE_S = 60.0
UNEVEN = (1.2, 1.1, 1.0, 1.0, 0.9, 0.8)  # of a layer's six experts; three of them may have 3.0, half of it
HEAVY, LIGHT = (0, 1, 4), (2, 3, 5)  # 3.2 and 2.8: seven hundredths too much


def _cluster(load: Sequence[float] = UNEVEN, num_workers: int = 2) -> SimulatedCluster:
    demand = replace(DEMAND, load=(tuple(load),) * len(SHAPE.moe_layers), num_expert_workers=num_workers)
    cluster = SimulatedCluster(0, [node(f"n{i}") for i in range(4)], replace(TERMS, demand=demand))
    _converge(cluster)
    return cluster


def _with_uneven_shards(load: Sequence[float] = UNEVEN) -> SimulatedCluster:
    """Just taken over by a controller that finds one worker with more than the other, though by less than the slack."""
    cluster = _cluster(load)
    for name, experts in (("expert-0", HEAVY), ("expert-1", LIGHT)):
        rows = range(len(SHAPE.moe_layers))
        cluster.processes[name].held = frozenset(Expert(row, i) for row in rows for i in experts)
    for process in cluster.attention():
        process.route = None
    cluster.new_controller(epoch=2)
    return cluster


def _converge(cluster: SimulatedCluster) -> None:
    for _ in range(round(CONVERGE_S / STEP_S)):
        if cluster.is_converged():
            return
        cluster.step()
    raise AssertionError(f"not converged: {cluster.decision}")


def _excess(cluster: SimulatedCluster) -> float:
    """By how much the heaviest worker of each layer is above an even part, as a share."""
    load = cluster.terms.demand.load
    heaviest = (
        max(sum(row[e.idx] for e in process.held if e.layer == i) for process in cluster.experts())
        for i, row in enumerate(load)
    )
    return sum(heaviest) / (sum(map(sum, load)) / len(cluster.experts())) - 1


def _new_shards(cluster: SimulatedCluster, seconds: float) -> Iterator[float]:
    """When other shards were decided for the same workers, in `seconds` of steps; nobody may be loading then."""
    for _ in range(round(seconds / STEP_S)):
        before = cluster.plan
        pending = any(isinstance(order, Assign) for process in cluster.experts() for _, order in process.orders)
        cluster.step()
        if before.shards_for == cluster.plan.shards_for and before.shards != cluster.plan.shards:
            assert not pending
            yield cluster.now_s


def test_what_is_a_little_uneven_is_evened_out_once_after_a_while() -> None:
    cluster = _with_uneven_shards()
    cluster.load_s = (1.0, 3.0)
    cluster.step()
    began_s = cluster.now_s
    assert _excess(cluster) > 0.06
    (at_s,) = _new_shards(cluster, 60.0)
    assert at_s > began_s + SETTLE_S
    _converge(cluster)
    assert _excess(cluster) <= FINE_SLACK
    assert all(not cluster.step().actions for _ in range(500))


def test_what_is_uneven_by_less_than_a_move_is_worth_stays() -> None:
    cluster = _with_uneven_shards((1.01, 1.0, 1.0, 1.0, 0.995, 0.995))
    _converge(cluster)
    assert 0.0 < _excess(cluster) <= FINE_SLACK
    decisions = [cluster.step() for _ in range(500)]
    assert not [a for d in decisions for a in d.actions if isinstance(a, Send) and isinstance(a.message, Assign)]


def test_a_worker_that_comes_and_goes_sets_off_no_moves_beside_those_of_its_loss() -> None:
    cluster = _with_uneven_shards()
    cluster.load_s = (0.0, 0.2)
    for _ in range(10):
        cluster.hang("expert-1", 2.0)
        for _ in range(round(SETTLE_S * 0.9 / STEP_S)):
            cluster.step()
            assert cluster.plan.shards_slack != FINE_SLACK
    cluster.run(CONVERGE_S)
    assert cluster.is_converged()
    assert _excess(cluster) <= FINE_SLACK


@pytest.mark.parametrize("start_s", [25.0, 0.1])
def test_while_a_lost_worker_is_on_its_way_back_nothing_is_moved_for_a_little(start_s: float) -> None:
    cluster = _cluster(num_workers=3)
    cluster.start_s = (start_s, start_s)
    cluster.kill("expert-1")
    while len(cluster.experts()) < 3:
        cluster.step()
        assert cluster.plan.shards_slack != FINE_SLACK
    cluster.run(CONVERGE_S)
    assert cluster.plan.shards_slack == FINE_SLACK
    assert cluster.is_converged()
