"""Placement: what always holds. Who holds which experts is in test_balance and test_shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.control.placement import Demand, Placement, place
from cluster.control.topology import Device, Node, Topology
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
    used: Counter[tuple[str, str]] = Counter()
    for worker in placement.workers:
        used[worker.place] += worker.memory_bytes
        if worker.role == "attention":
            assert worker.kv_bytes >= demand.kv_bytes
            assert worker.memory_bytes == demand.attention_bytes + worker.kv_bytes
    room = {(node.id, device.id): device.memory_bytes for node in topology.nodes for device in node.devices}
    assert all(size <= room[device] for device, size in used.items())
    assert len(placement.of_role("attention")) == demand.num_attention_workers
    assert 1 <= len(placement.of_role("expert")) <= demand.num_expert_workers
    assert len({worker.id for worker in placement.workers}) == len(placement.workers)
    slots = [worker.memory_bytes // demand.expert_bytes for worker in placement.of_role("expert")]
    assert sum(slots) >= demand.num_experts
    assert all(num >= 1 for num in slots)


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
    assert place(Topology(topology.nodes[::-1]), demand) == first  # the order of nodes does not matter


@given(problems(), st.integers(0, 5))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_when_a_node_is_lost_the_workers_of_the_others_keep_what_they_have(
    problem: tuple[Topology, Demand], which: int
) -> None:
    topology, demand = problem
    first = _place(topology, demand)
    lost = topology.nodes[which % len(topology.nodes)]
    rest = Topology(tuple(node for node in topology.nodes if node != lost))
    second = {worker.id: worker for worker in _place(rest, demand, first).workers}
    gone = [worker for worker in first.workers if worker.node_id == lost.id]
    for worker in first.workers:
        after = second.get(worker.id)
        if worker in gone:
            assert after is None
        elif worker.role == "attention":  # experts that would not fit may take its KV room
            assert after is not None
            assert after.place == worker.place
            assert after.kv_bytes <= worker.kv_bytes
        elif not any(other.role == "attention" for other in gone):  # a lost attention worker takes any room
            assert after is not None
            assert after.place == worker.place
            assert after.memory_bytes >= worker.memory_bytes


@given(problems(), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_placing_settles_whatever_changes(problem: tuple[Topology, Demand], data: st.DataObject) -> None:
    """New nodes and sizes: once placed, nothing changes any more."""
    topology, demand = problem
    current = _place(topology, demand)
    other, changed = data.draw(problems())
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
    assert [worker.memory_bytes for worker in placement.of_role("expert")] == [8 * EXPERT_BYTES] * 2  # room for all
    assert [worker.kv_bytes for worker in placement.of_role("attention")] == [250 - 80 - 50, 250 - 50]


def test_running_attention_workers_keep_their_kv_room_unless_experts_would_not_fit() -> None:
    topology = _topology(250, 250, 250)
    first = place(topology, DEMAND)
    without = Topology(topology.nodes[:2])
    second = place(without, DEMAND, first)  # expert-1 on n0 has room for all experts
    assert second.of_role("attention") == first.of_role("attention")
    only = Topology(topology.nodes[1:2])  # no expert worker is left, and all memory is KV room
    third = place(only, replace(DEMAND, num_attention_workers=1), first)
    assert [worker.id for worker in third.workers] == ["attention-1", "expert-2", "expert-3"]
    _check(only, replace(DEMAND, num_attention_workers=1), third)


def test_one_worker_more_goes_to_the_new_node() -> None:
    first = place(_topology(250, 250, 250), DEMAND)
    second = place(_topology(250, 250, 250, 250), replace(DEMAND, num_expert_workers=3), first)
    assert second.of_role("expert")[:2] == first.of_role("expert")
    assert second.of_role("expert")[2].node_id == "n3"


def test_a_lost_attention_worker_takes_free_room_before_that_of_expert_workers() -> None:
    first = place(_topology(80, 80, 75, 75), DEMAND)
    assert {worker.node_id for worker in first.of_role("expert")} == {"n2", "n3"}
    with_room = Topology((_node("n0", 80), _node("n2", 75), _node("n3", 75), _node("z", 70)))
    second = place(with_room, DEMAND, first)
    assert [worker.node_id for worker in second.of_role("attention")] == ["n0", "z"]
    assert second.of_role("expert") == first.of_role("expert")
    without = Topology(with_room.nodes[:3])
    third = place(without, DEMAND, first)
    assert [worker.node_id for worker in third.of_role("attention")] == ["n0", "n2"]
    _check(without, DEMAND, third)


def test_fewer_workers_asked_for_are_the_first_ones() -> None:
    topology = _topology(250, 250, 250)
    first = place(topology, DEMAND)
    second = place(topology, replace(DEMAND, num_expert_workers=1, num_attention_workers=1), first)
    assert [worker.id for worker in second.workers] == ["attention-0", "expert-0"]


def test_an_index_is_not_given_to_another_worker() -> None:
    first = place(_topology(250, 250, 250), DEMAND)
    second = place(Topology((_node("n0", 250), _node("n1", 250), _node("new", 250))), DEMAND, first)
    assert [worker.id for worker in second.of_role("expert")] == ["expert-1", "expert-2"]


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
