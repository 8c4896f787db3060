from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.control.ray_actor import for_workers
from cluster.control.ray_launcher import to_node
from cluster.control.ray_messages import Call, Connect, RayNode
from cluster.control.topology import MEMORY_SHARE
from cluster.errors import ConfigError

GIB = 2**30
CONNECT = Connect(cluster_name="c", address=None, host=None, logs_dir="", start_timeout_s=1.0, command=())
OURS, THEIRS = "00aa", "00bb"  # ids of two clusters called c


def test_a_nodes_gpus_are_what_is_placed_on() -> None:
    node = to_node(RayNode(name="n", machine="10.0.0.1", num_cores=8, memory_bytes=64 * GIB, gpu_bytes=(80 * GIB,) * 2))
    assert [device.id for device in node.compute_devices] == ["cuda:0", "cuda:1"]
    assert node.compute_devices[0].memory_bytes == int(80 * GIB * MEMORY_SHARE)
    assert (node.failure_domain, node.num_cores, node.machine) == ("n", 8, "10.0.0.1")


def test_a_node_without_gpus_is_its_processor() -> None:
    node = to_node(RayNode(name="n", machine="m", num_cores=8, memory_bytes=10 * GIB))
    (device,) = node.compute_devices
    assert (device.id, device.memory_bytes) == ("cpu", int(10 * GIB * MEMORY_SHARE))


def test_a_worker_is_not_held_to_its_actors_one_thread() -> None:
    assert for_workers({"OMP_NUM_THREADS": "1", "PYTHONBREAKPOINT": "ray", "HOME": "/h"}) == {"HOME": "/h"}


@pytest.mark.needs("ray")
def test_an_actor_inherits_no_secret_of_its_job() -> None:
    from cluster.control.ray_bridge import ACTOR_ENVIRONMENT

    assert (ACTOR_ENVIRONMENT["FORETOKEN_STORE"], ACTOR_ENVIRONMENT["FORETOKEN_TOKEN"]) == ("", "")


@pytest.mark.needs("ray")
def test_a_worker_reserves_its_share_of_a_gpu() -> None:
    from cluster.control.ray_bridge import gpu_share

    assert gpu_share(20 * GIB, (80 * GIB, 40 * GIB), 0) == 0.25
    assert gpu_share(20 * GIB, (80 * GIB, 40 * GIB), 1) == 0.5
    assert gpu_share(100 * GIB, (80 * GIB,), 0) == 1.0
    assert gpu_share(1, (80 * GIB,), 0) == 0.0001  # Ray's least
    assert gpu_share(GIB, (), 3) == 1.0  # its size is not known


class _Actors:
    """What the bridge uses of Ray to end actors; those in `silent` never answer. Time passes in `wait` only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str], silent: set[str]) -> None:
        from cluster.control import ray_bridge

        self.silent = silent
        self.calls: list[tuple[str, str, tuple[object, ...]]] = []  # actor, method, arguments
        self.killed: list[str] = []
        self.now_s = 0.0
        self.exceptions = SimpleNamespace()
        there = [{"name": name, "namespace": CONNECT.namespace} for name in names]
        others = [{"name": f"{THEIRS}:expert-9", "namespace": "foretoken-d"}]  # of a cluster of another name
        self.util = SimpleNamespace(list_named_actors=lambda **_: there + others)
        monkeypatch.setattr(ray_bridge, "ray", self)
        monkeypatch.setattr(ray_bridge, "time", SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._pass))

    def _pass(self, seconds: float) -> None:
        self.now_s += seconds

    def get_actor(self, name: str) -> SimpleNamespace:
        def method(what: str) -> SimpleNamespace:
            def remote(*arguments: object) -> tuple[str, str]:
                self.calls.append((name, what, arguments))
                return name, what

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(name=name, stop=method("stop"), is_idle=method("is_idle"))

    def wait(
        self, references: list[tuple[str, str]], *, num_returns: int, timeout: float
    ) -> tuple[list[Any], list[Any]]:
        assert num_returns == len(references)
        done = [reference for reference in references if reference[0] not in self.silent]
        if len(done) < num_returns:
            self._pass(timeout)
        return done, [reference for reference in references if reference not in done]

    def get(self, reference: tuple[str, str], timeout: float) -> bool:
        return True

    def kill(self, actor: SimpleNamespace) -> None:
        self.killed.append(actor.name)


@pytest.mark.needs("ray")
@pytest.mark.parametrize("num_silent", [0, 1, 9])
def test_however_many_actors_say_nothing_ending_all_keeps_one_deadline(
    monkeypatch: pytest.MonkeyPatch, num_silent: int
) -> None:
    from cluster.control.ray_bridge import Bridge, actor_name

    names = [actor_name(OURS, f"expert-{i}") for i in range(10)]
    silent = set(names[:num_silent])
    actors = _Actors(monkeypatch, names, silent)
    call = Call(id=1, method="end_all", cluster_id=OURS, timeout_s=30.0)
    assert Bridge(CONNECT).answer(call) == 10 - num_silent
    assert actors.now_s <= (call.timeout_s if num_silent else 1.0)
    assert {name for name, what, arguments in actors.calls if (what, arguments) == ("stop", (0, True))} == silent
    assert sorted(actors.killed) == sorted(names)


@pytest.mark.needs("ray")
def test_a_cluster_ends_its_own_actors_and_leaves_anothers_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.control.ray_bridge import Bridge, actor_name

    ours = actor_name(OURS, "expert-0")
    names = [ours, actor_name(THEIRS, "expert-0"), "attention-0"]  # the last is nobody's that is known
    actors = _Actors(monkeypatch, names, silent=set())
    assert Bridge(CONNECT).answer(Call(id=1, method="end_all", cluster_id=OURS, timeout_s=30.0)) == 1
    assert actors.killed == [ours]
    assert {name for name, _, _ in actors.calls} == {ours}


@pytest.mark.needs("ray")
def test_another_cluster_of_the_same_name_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.control.ray_bridge import Bridge, actor_name

    names = [actor_name(OURS, "expert-0"), actor_name(OURS, "attention-0")]
    _Actors(monkeypatch, names, silent=set())
    assert Bridge(CONNECT).answer(Call(id=1, method="check_alone", cluster_id=OURS)) is None
    with pytest.raises(
        ConfigError, match=r"another cluster called c has workers .*\(attention-0, expert-0\)"
    ) as caught:
        Bridge(CONNECT).answer(Call(id=2, method="check_alone", cluster_id=THEIRS))
    assert caught.value.param == "cluster_name"
    assert "--cluster-name" in caught.value.message
