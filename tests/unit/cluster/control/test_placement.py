"""Placement: what always holds. How far the balance is from an exact optimum is in test_balance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.control.balance import Expert
from cluster.control.placement import Demand, PlacedWorker, Placement, place
from cluster.control.topology import Device, Link, Node, Topology
from cluster.errors import InvalidValueError, PlacementError

EXPERT_BYTES = 10
DEMAND = Demand(
    load=((4.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 5.0)),
    expert_bytes=EXPERT_BYTES,
    num_expert_workers=2,
    num_attention_workers=2,
    attention_bytes=50,
    kv_bytes=20,
)


def _node(name: str, *memory_bytes: int, domain: str | None = None) -> Node:
    devices = tuple(Device(f"cuda:{i}", "cuda", size) for i, size in enumerate(memory_bytes))
    return Node(name, domain or name, 1000, devices)


def _topology(*memory_bytes: int) -> Topology:
    return Topology(tuple(_node(f"n{i}", size) for i, size in enumerate(memory_bytes)))


def _check(topology: Topology, demand: Demand, placement: Placement) -> None:
    """What holds of every placement."""
    domains = {node.id: node.failure_domain for node in topology.nodes}
    used: Counter[tuple[str, str]] = Counter()
    for worker in placement.workers:
        used[worker.place] += worker.memory_bytes
        if worker.role == "expert":
            assert len(worker.experts) * demand.expert_bytes <= worker.memory_bytes
        else:
            assert not worker.experts
            assert worker.kv_bytes >= demand.kv_bytes
            assert worker.memory_bytes == demand.attention_bytes + worker.kv_bytes
    room = {(node.id, device.id): device.memory_bytes for node in topology.nodes for device in node.devices}
    assert all(size <= room[device] for device, size in used.items())
    assert len(placement.of_role("attention")) == demand.num_attention_workers
    assert 1 <= len(placement.of_role("expert")) <= demand.num_expert_workers
    assert len({worker.id for worker in placement.workers}) == len(placement.workers)
    wanted = {Expert(layer, i) for layer, row in enumerate(demand.load) for i in range(len(row))}
    assert set().union(*(worker.experts for worker in placement.workers)) == wanted
    for expert in wanted:
        holders = placement.holders(expert)
        assert 1 <= len(holders) <= demand.max_copies
        assert len({domains[worker.node_id] for worker in holders}) == len(holders)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Topology, Demand]:
    """Up to six nodes in up to four domains; memory from too little to plenty."""
    nodes = [
        _node(
            f"n{i}",
            *draw(st.lists(st.integers(0, 300), min_size=1, max_size=2)),
            domain=f"d{draw(st.integers(0, 3))}",
        )
        for i in range(draw(st.integers(1, 6)))
    ]
    num_experts = draw(st.integers(1, 6))
    row = st.tuples(*[st.floats(0, 100)] * num_experts)
    demand = Demand(
        load=tuple(draw(st.lists(row, min_size=1, max_size=3))),
        expert_bytes=EXPERT_BYTES,
        num_expert_workers=draw(st.integers(1, 5)),
        num_attention_workers=draw(st.integers(1, 3)),
        attention_bytes=draw(st.integers(0, 60)),
        kv_bytes=draw(st.integers(0, 60)),
        max_copies=draw(st.integers(1, 3)),
        slack=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )
    return Topology(tuple(nodes)), demand


def _place(topology: Topology, demand: Demand, current: Placement | None = None) -> Placement:
    """A checked placement; a problem that is refused is no example."""
    try:
        placement = place(topology, demand, current)
    except PlacementError:
        assume(False)
        raise
    _check(topology, demand, placement)
    return placement


@given(problems())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_placement_holds_what_it_promises_and_placing_again_changes_nothing(
    problem: tuple[Topology, Demand],
) -> None:
    topology, demand = problem
    first = _place(topology, demand)
    assert place(topology, demand, first) == first
    assert first.moves_from(first) == ()
    assert place(Topology(topology.nodes[::-1]), demand) == first  # the order of nodes does not matter


@given(problems(), st.integers(0, 5))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_of_a_lost_node_only_what_it_held_moves(problem: tuple[Topology, Demand], which: int) -> None:
    topology, demand = problem
    first = _place(topology, demand)
    lost = topology.nodes[which % len(topology.nodes)]
    rest = Topology(tuple(node for node in topology.nodes if node != lost))
    second = _place(rest, demand, first)
    sizes = {worker.id: (worker.place, worker.memory_bytes) for worker in second.workers}
    gone = [worker for worker in first.workers if worker.node_id == lost.id]
    displaced = [
        worker
        for worker in first.workers
        if worker not in gone and sizes.get(worker.id) != (worker.place, worker.memory_bytes)
    ]
    held = {expert for worker in (*gone, *displaced) for expert in worker.experts}
    assert {expert for _, expert in second.moves_from(first)} <= held
    for worker in displaced:  # experts that would not fit take KV room, a lost attention worker takes any
        assert worker.role == "attention" or any(other.role == "attention" for other in gone)
        assert worker.role == "expert" or sizes[worker.id][0] == worker.place


@given(problems(), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_placing_settles_whatever_changes(problem: tuple[Topology, Demand], data: st.DataObject) -> None:
    """New loads, nodes and sizes: the second placement may repair, the third balance; then nothing moves any more."""
    topology, demand = problem
    current = _place(topology, demand)
    other, changed = data.draw(problems())
    current = _place(other, changed, current)
    current = _place(other, changed, current)
    assert place(other, changed, current) == current


def test_roles_are_spread_over_domains_and_memory_is_used_up() -> None:
    placement = place(_topology(250, 250, 250), DEMAND)
    assert [(worker.id, worker.node_id) for worker in placement.workers] == [
        ("attention-0", "n0"),
        ("attention-1", "n1"),
        ("expert-0", "n2"),
        ("expert-1", "n0"),
    ]
    assert all(len(worker.experts) == 8 for worker in placement.of_role("expert"))  # every expert twice
    assert [worker.kv_bytes for worker in placement.of_role("attention")] == [250 - 80 - 50, 250 - 50]


def test_without_memory_for_all_the_hottest_experts_have_replicas() -> None:
    placement = place(_topology(70, 70, 50, 50), DEMAND)
    copies = Counter(expert for worker in placement.workers for expert in worker.experts)
    assert {expert for expert, num in copies.items() if num == 2} == {Expert(0, 0), Expert(1, 3)}


def test_copies_never_share_a_failure_domain() -> None:
    nodes = (_node("a", 400), _node("b", 400, domain="rack"), _node("c", 400, domain="rack"))
    demand = replace(DEMAND, num_expert_workers=3, max_copies=3)
    placement = place(Topology(nodes), demand)
    _check(Topology(nodes), demand, placement)
    assert max(len(placement.holders(Expert(0, i))) for i in range(4)) == 2


def test_expert_workers_are_well_linked_to_attention_workers() -> None:
    nodes = tuple(_node(f"n{i}", 100 if i else 70) for i in range(4))
    links = (Link(("n0", "n1"), 1.0), Link(("n0", "n2"), 3.0), Link(("n0", "n3"), 2.0))
    demand = replace(DEMAND, num_attention_workers=1)
    current = Placement((PlacedWorker("attention", 0, "n0", "cuda:0", 70, 20),))
    placement = place(Topology(nodes, links), demand, current)
    assert [worker.node_id for worker in placement.of_role("expert")] == ["n2", "n3"]


def test_running_attention_workers_keep_their_kv_room_unless_experts_would_not_fit() -> None:
    topology = _topology(250, 250, 250)
    first = place(topology, DEMAND)
    without = Topology(topology.nodes[:2])
    second = place(without, DEMAND, first)  # expert-1 on n0 has all experts already
    assert second.of_role("attention") == first.of_role("attention")
    assert second.moves_from(first) == ()
    only = Topology(topology.nodes[1:2])  # no expert worker is left, and all memory is KV room
    third = place(only, replace(DEMAND, num_attention_workers=1), first)
    assert [worker.id for worker in third.workers] == ["attention-1", "expert-2", "expert-3"]
    _check(only, replace(DEMAND, num_attention_workers=1), third)


def test_a_new_node_and_one_worker_more_take_a_share() -> None:
    demand = replace(DEMAND, load=((3.0, 2.0, 2.0, 2.0),), max_copies=1)
    first = place(_topology(250, 250, 250), demand)
    second = place(_topology(250, 250, 250, 250), replace(demand, num_expert_workers=3, slack=0.0), first)
    assert second.of_role("expert")[2].node_id == "n3"
    ((worker_id, _),) = second.moves_from(first)  # 3+2 and 2+2 before, 3 and 2+2 and 2 now
    assert worker_id == "expert-2"


def test_a_lost_attention_worker_takes_free_room_before_that_of_expert_workers() -> None:
    first = place(_topology(80, 80, 75, 75), DEMAND)
    assert {worker.node_id for worker in first.of_role("expert")} == {"n2", "n3"}
    with_room = Topology((_node("n0", 80), _node("n2", 75), _node("n3", 75), _node("z", 70)))
    second = place(with_room, DEMAND, first)
    assert [worker.node_id for worker in second.of_role("attention")] == ["n0", "z"]
    assert second.moves_from(first) == ()
    without = Topology(with_room.nodes[:3])
    third = place(without, DEMAND, first)
    assert [worker.node_id for worker in third.of_role("attention")] == ["n0", "n2"]
    _check(without, DEMAND, third)


def test_fewer_workers_asked_for_are_the_first_ones() -> None:
    topology = _topology(250, 250, 250)
    first = place(topology, DEMAND)
    second = place(topology, replace(DEMAND, num_expert_workers=1, num_attention_workers=1), first)
    assert [worker.id for worker in second.workers] == ["attention-0", "expert-0"]
    assert second.moves_from(first) == ()


def test_an_index_is_not_given_to_another_worker() -> None:
    first = place(_topology(250, 250, 250), DEMAND)
    second = place(Topology((_node("n0", 250), _node("n1", 250), _node("new", 250))), DEMAND, first)
    assert [worker.id for worker in second.of_role("expert")] == ["expert-1", "expert-2"]


def test_a_placement_prints_as_a_table() -> None:
    text = str(place(_topology(250, 250, 250), replace(DEMAND, max_copies=1)))
    lines = text.splitlines()
    assert lines[0].split() == ["worker", "node", "device", "memory", "GiB", "KV", "GiB", "experts", "by", "layer"]
    assert lines[1].split()[:3] == ["attention-0", "n0", "cuda:0"]
    assert lines[3].split()[:3] == ["expert-0", "n2", "cuda:0"]
    everything = str(Placement((PlacedWorker("expert", 0, "n", "cpu", 8, experts=frozenset(map(_expert, "01247"))),)))
    assert everything.endswith("0: 0-2,4,7")


def _expert(digit: str) -> Expert:
    return Expert(0, int(digit))


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (Topology(()), "attention worker 1 of 2 needs 70 bytes .* there is no device"),
        (_topology(80, 60), "attention worker 2 of 2 needs 70 bytes .* the freest device, n1/cuda:0, has 60"),
        (_topology(70, 70, 75), "8 experts of 10 bytes do not fit: .* room for 7 on 2 expert workers"),
        (_topology(70, 70), "8 experts of 10 bytes do not fit: .* room for 0 on 0 expert workers"),
    ],
)
def test_what_does_not_fit_is_named(topology: Topology, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        place(topology, DEMAND)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"expert_bytes": 0}, "expert_bytes"),
        ({"num_expert_workers": 0}, "num_expert_workers"),
        ({"kv_bytes": -1}, "kv_bytes"),
        ({"max_copies": 0}, "max_copies"),
        ({"slack": float("nan")}, "slack"),
        ({"load": ()}, "load"),
        ({"load": ((1.0, -1.0),)}, "load"),
        ({"load": ((float("inf"),),)}, "load"),
    ],
)
def test_a_demand_out_of_range_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidValueError, match=field) as raised:
        replace(DEMAND, **change)  # type: ignore[arg-type]
    assert raised.value.param == field
