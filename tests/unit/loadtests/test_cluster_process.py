"""A load test's own cluster: nothing of the caller's other clusters, and what is missing of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from cluster.config import Settings
from cluster.errors import ConfigError
from cluster.operate.state_file import ClusterFiles
from cluster.protocol import Role
from cluster.store.records import ClusterStatus, NodeStatus, WorkerStatus
from loadtests import cluster_process
from loadtests.cluster_process import LocalCluster, local_cluster, own_environment, own_settings
from loadtests.processes import BenchError, Child

CHILDREN = dict.fromkeys(("controller", "gateway", "redis", "ray-0", "ray-1"), 7)


@pytest.fixture(autouse=True)
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for other clusters."""
    monkeypatch.setenv("FORETOKEN_HOME", str(tmp_path))
    monkeypatch.setenv("FORETOKEN_STORE", "redis://elsewhere")
    monkeypatch.setenv("FORETOKEN_LEASE_S", "3")
    monkeypatch.setenv("FORETOKEN_TOKEN", "theirs")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")


def test_the_environment_has_the_home_and_nothing_for_other_clusters(tmp_path: Path) -> None:
    ours = own_environment(RAY_some_delay_s="3")
    assert ours["FORETOKEN_HOME"] == str(tmp_path)
    assert ours["RAY_some_delay_s"] == "3"
    assert not {"FORETOKEN_STORE", "FORETOKEN_LEASE_S", "FORETOKEN_TOKEN", "RAY_ADDRESS"} & set(ours)
    assert ours["PATH"] == os.environ["PATH"]


def test_the_settings_are_those_that_such_a_process_has(tmp_path: Path) -> None:
    settings = own_settings(local=2, cluster_name="mine")
    assert (settings.local, settings.cluster_name, settings.home) == (2, "mine", tmp_path)
    assert (settings.store, settings.token) == (None, None)
    assert settings.lease_s == Settings.model_fields["lease_s"].default
    assert settings.port > 0
    assert own_settings(port=1234).port == 1234
    with pytest.raises(ConfigError, match=r"port = 99999 \(from --port\)"):
        own_settings(port=99999)


# -------------------------------------------------------------------------------------------------- what is missing


@dataclass(frozen=True)
class Told(LocalCluster):
    """A cluster of which this is known."""

    known: dict[str, int] = field(default_factory=dict)
    seen: ClusterStatus | None = None
    starting: str = ""

    def is_up(self, node: str) -> bool:
        return node != self.starting

    def children(self) -> dict[str, int]:
        return self.known

    def status(self) -> ClusterStatus | None:
        return self.seen


def _worker(name: str, role: Role, experts: int = 0, condition: str = "serving") -> WorkerStatus:
    return WorkerStatus(
        name=name,
        role=role,
        node_id="n0",
        address="",
        pid=1,
        condition="serving" if condition == "serving" else "lost",
        num_experts=experts,
    )


def _status(
    *experts: int, at_s: float = 0.0, nodes: int = 2, lost: str = "", problem: str | None = None
) -> ClusterStatus:
    workers = [_worker(f"attention-{i}", "attention") for i in range(2)]
    workers += [_worker(f"expert-{i}", "expert", held) for i, held in enumerate(experts)]
    if lost:
        workers.append(_worker(lost, "attention", condition="lost"))
    return ClusterStatus(
        cluster="c",
        model="m",
        epoch=1,
        controller_id="i",
        at_s=at_s,  # before now
        num_layers=2,
        num_experts=8,
        nodes=tuple(NodeStatus(node_id=f"n{i}", memory_bytes=1, is_alive=i < nodes) for i in range(2)),
        workers=tuple(workers),
        problem=problem,
    )


def _now(status: ClusterStatus | None) -> ClusterStatus | None:
    return None if status is None else msgspec.structs.replace(status, at_s=time.time() + status.at_s)


@pytest.mark.parametrize(
    ("children", "status", "problem"),
    [
        (CHILDREN, _status(8, 8), ""),
        ({**CHILDREN, "ray-1": None}, _status(8, 8), "ray-1 not running"),
        (CHILDREN, None, "no fresh status"),
        (CHILDREN, _status(8, 8, at_s=-60.0), "no fresh status"),
        (CHILDREN, _status(8, 8, problem="no room"), "no room"),
        (CHILDREN, _status(8, 8, nodes=1), "a node is missing"),
        (CHILDREN, _status(16), "3 of 4 workers serve"),
        (CHILDREN, _status(8, 8, lost="attention-2"), "4 of 4 workers serve"),
        (CHILDREN, _status(16, 0), "experts held: [16, 0]"),
        (CHILDREN, _status(8, 7), "experts held: [8, 7]"),
    ],
)
def test_what_is_missing_is_said(
    children: dict[str, int | None], status: ClusterStatus | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_process, "is_ready", lambda url: True)
    known = {name: pid for name, pid in children.items() if pid is not None}
    with Child("idle", ["sleep", "60"], os.environ) as child:
        cluster = Told(child, own_settings(local=2), known=known, seen=_now(status))
        assert cluster.problem() == problem
        if problem:
            with pytest.raises(BenchError, match=r"not whole after 0 s: .*; see the logs in"):
                cluster.wait_whole(0.0)


@pytest.mark.parametrize(("shards", "problem"), [((16, 16), ""), ((8, 8), "experts held: [8, 8]")])
def test_a_cluster_with_copies_is_whole_when_every_expert_has_them(
    shards: tuple[int, ...], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_process, "is_ready", lambda url: True)
    with Child("idle", ["sleep", "60"], os.environ) as child:
        settings = own_settings(local=2, expert_copies=3)  # no more than there are workers
        cluster = Told(child, settings, known=CHILDREN, seen=_now(_status(*shards)))
        assert cluster.problem() == problem


def test_a_node_whose_ray_is_still_starting_is_missing_though_its_workers_report() -> None:
    with Child("idle", ["sleep", "60"], os.environ) as child:
        cluster = Told(child, own_settings(local=2), known=CHILDREN, seen=_now(_status(8, 8)), starting="ray-1")
        assert cluster.problem() == "ray-1 starting"


@pytest.mark.needs("linux")
def test_a_node_is_up_once_its_ray_says_so_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = own_settings(local=1).model_copy(update={"home": tmp_path})
    log = ClusterFiles(settings).logs / "ray-0.log"
    log.parent.mkdir(parents=True)
    raylet = tmp_path / "raylet"
    raylet.symlink_to("/bin/sleep")
    with Child("idle", [str(raylet), "60"], os.environ) as child, Child("other", ["sleep", "60"], os.environ) as other:
        cluster = Told(child, settings, known={"ray-0": child.pid, "ray-1": other.pid})
        before = f"{cluster_process.STARTING} 1\n{cluster_process.STARTED}\n"
        for said, is_up in ((before, True), (f"{before}{cluster_process.STARTING} 1\n", False)):
            log.write_text(said)
            assert LocalCluster.is_up(cluster, "ray-0") == is_up
        log.with_name("ray-1.log").write_text(before)
        assert not LocalCluster.is_up(cluster, "ray-1")  # its command runs, and no raylet does
        assert not LocalCluster.is_up(cluster, "ray-2")


def test_a_gateway_that_is_not_ready_is_missing() -> None:
    with Child("idle", ["sleep", "60"], os.environ) as child:
        cluster = Told(child, own_settings(local=2), known=CHILDREN, seen=_now(_status(8, 8)))
        assert cluster.problem() == "the gateway is not ready"


# ------------------------------------------------------------------------------------------------ starting and ending


def test_what_cluster_up_says_at_its_end_is_what_is_raised() -> None:
    script = "import sys; sys.exit('log lines\\nError: port 1 is in use: end what uses it')"
    with Child("cluster up", ["python3", "-c", script], os.environ) as child:
        cluster = LocalCluster(child, own_settings(local=2))
        child._process.wait(60)
        with pytest.raises(BenchError, match=r"^port 1 is in use: end what uses it$"):
            cluster.wait_whole(60.0)


def test_another_cluster_of_its_name_is_left_alone() -> None:
    settings = own_settings(local=2, cluster_name="taken")
    with (
        ClusterFiles(settings).held(),
        pytest.raises(ConfigError, match="a cluster called taken runs on this machine"),
        local_cluster(settings),
    ):
        pytest.fail("it was started beside another")
