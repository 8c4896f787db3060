from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cluster.config import Settings, load
from cluster.errors import ConfigError, PlacementError, StartRefusedError, UnreadableValueError
from cluster.operate.coming_up import ComingUp, Sight
from cluster.protocol import Lead
from cluster.store.memory import MemoryStore
from cluster.store.records import (
    LEAD_KEY,
    STATUS_KEY,
    ClusterStatus,
    NodeStatus,
    StartFailure,
    WorkerStatus,
    read_lead,
    read_status,
)

pytestmark = pytest.mark.anyio

WORKER = WorkerStatus(name="expert-0", role="expert", node_id="n", address="a:1", pid=1, condition="serving")
STATUS = ClusterStatus(
    cluster="one",
    model="demo",
    epoch=2,
    controller_id="ours",
    at_s=20.0,
    num_layers=1,
    num_experts=1,
    nodes=(NodeStatus(node_id="n", memory_bytes=1),),
    workers=(WORKER,),
)
OURS = Lead(epoch=2, controller_id="ours")
OTHER = Lead(epoch=3, controller_id="other")
replace = msgspec.structs.replace


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load({"home": tmp_path, "cluster_name": "one", "served_model_name": "demo", "local": 1})


def test_it_serves_when_every_worker_does(settings: Settings) -> None:
    coming_up = ComingUp(settings, None)
    starting = replace(STATUS, workers=(WORKER, replace(WORKER, name="expert-1", condition="starting")))
    ill = replace(STATUS, problem="expert-0: something")
    assert not coming_up.is_serving(Sight(None, None))
    for status in (starting, ill, replace(STATUS, workers=())):
        assert not coming_up.is_serving(Sight(status, OURS, "ours"))
    assert coming_up.problem == "expert-0: something"
    assert coming_up.is_serving(Sight(STATUS, OURS, "ours"))


def test_what_an_earlier_cluster_left_is_not_believed(settings: Settings) -> None:
    """Its workers may be there still, and its lead too for a moment."""
    before = replace(STATUS, controller_id="other")
    coming_up = ComingUp(settings, before)
    assert not coming_up.is_serving(Sight(before, OTHER))
    assert not coming_up.is_serving(Sight(before, None))
    assert not coming_up.is_serving(Sight(before, OURS, "ours"))
    assert coming_up.is_serving(Sight(STATUS, OURS, "ours"))


def test_failures_of_an_earlier_cluster_do_not_count(settings: Settings) -> None:
    failure = StartFailure(code="start_refused", message="no", worker="expert-0")
    before = replace(STATUS, controller_id="other", failures=(failure,))
    assert not ComingUp(settings, before).is_serving(Sight(before, OTHER))


def test_another_leader_of_the_same_cluster_will_do_while_it_lives(settings: Settings) -> None:
    coming_up = ComingUp(settings, replace(STATUS, controller_id="other"))
    now = replace(STATUS, controller_id="other", at_s=21.0)
    assert not coming_up.is_serving(Sight(now, None))
    assert coming_up.is_serving(Sight(now, OTHER))


def test_another_clusters_leader_is_an_error(settings: Settings) -> None:
    now = replace(STATUS, controller_id="other", model="another")
    with pytest.raises(ConfigError, match="controller other, which something else started, leads the cluster one"):
        ComingUp(settings, None).is_serving(Sight(now, OTHER))


def test_a_worker_that_never_starts_ends_the_wait_with_its_own_error(settings: Settings) -> None:
    coming_up = ComingUp(settings, None)
    assert not coming_up.is_serving(Sight(replace(STATUS, problem="expert-0 does not start: by chance"), OURS, "ours"))
    failure = StartFailure(code="start_refused", message="the model needs 3 GiB", worker="expert-0")
    with pytest.raises(StartRefusedError, match=r"expert-0 does not start: the model needs 3 GiB \(its log is in "):
        coming_up.is_serving(Sight(replace(STATUS, failures=(failure,)), OURS, "ours"))


def test_no_room_is_final_once_all_our_nodes_are_there(settings: Settings) -> None:
    no_room = replace(STATUS, failures=(StartFailure(code="placement_impossible", message="too small"),), workers=())
    two_nodes = settings.model_copy(update={"local": 2})
    assert not ComingUp(two_nodes, None).is_serving(Sight(no_room, OURS, "ours"))
    joined = settings.model_copy(update={"local": None})
    assert not ComingUp(joined, None).is_serving(Sight(no_room, OURS, "ours"))
    with pytest.raises(PlacementError, match="does not come up: too small"):
        ComingUp(settings, None).is_serving(Sight(no_room, OURS, "ours"))


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff", b"[]", b"[" * 100_000])
async def test_what_cannot_be_read_is_a_typed_error(garbage: bytes) -> None:
    store = MemoryStore()
    assert (await read_status(store), await read_lead(store)) == (None, None)
    for key, read in ((STATUS_KEY, read_status), (LEAD_KEY, read_lead)):
        version = await store.compare_and_set(key, garbage, expected=0)
        assert version is not None
        with pytest.raises(UnreadableValueError, match=f"the store's {key} cannot be read"):
            await read(store)
        value = msgspec.json.encode(STATUS if key == STATUS_KEY else OURS)
        await store.compare_and_set(key, value, expected=version)
        assert await read(store) in (STATUS, OURS)
