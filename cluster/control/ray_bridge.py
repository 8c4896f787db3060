"""The Ray driver of a `RayLauncher`, in a process of its own: ``python -m cluster.control.ray_bridge``.

JSON lines: `Connect` and then `Call`s on standard input, `Reply`s on standard output. It ends when its input does.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TextIO

import msgspec
import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ENV_PREFIX, SECRETS
from cluster.control.ray_actor import Answer, WorkerActor
from cluster.control.ray_messages import CALL_TIMEOUT_S, Call, Connect, RayNode, Reply, Target
from cluster.errors import ConfigError, ForetokenError, UnavailableError, by_code
from cluster.machine import gpu_bytes
from cluster.protocol import Announcement

ACTOR_CPUS = 0.01  # it only watches
ACTOR_CONCURRENCY = 8
ACTOR_TIMEOUT_S = 15.0  # for an actor's start, and for its answer
NAME_TIMEOUT_S = 5.0  # until the name of an actor that was killed is free
PROBE_TIMEOUT_S = 1.0
POLL_S = 0.1
RECONNECT_TIMEOUT_S = 10  # Ray's own, after which it ends this process; the next one then tries
ACTOR_ENVIRONMENT = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # a worker finds its GPU by its index: Ray only counts them
    **{ENV_PREFIX + name.upper(): "" for name in SECRETS},  # a job's own variables would be inherited
}


class Bridge:
    """What the launcher asks, done with Ray. Calls come from several threads."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._gpu_bytes: dict[str, tuple[int, ...]] = {}  # by Ray's id of the node
        self._lock = threading.Lock()  # one actor of a name is made at a time
        runtime_env: dict[str, Any] = {"env_vars": dict(ACTOR_ENVIRONMENT)}
        if not _in_job():  # a job's working_dir is where actors find our code
            runtime_env["env_vars"]["PYTHONPATH"] = connect.packages
        self._runtime_env = runtime_env

    def connect(self) -> None:
        """Join the Ray that runs. Raises `UnavailableError` with the reason."""
        address = self._connect.address or "auto"
        if address not in ("auto", "local") and "://" not in address:
            _probe(address)
        try:
            ray.init(
                address=address,
                namespace=self._connect.namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise UnavailableError(f"{_first_line(error)} (address {address})") from None

    def answer(self, call: Call) -> Any:
        """The result of a call; raises `ForetokenError`, or what Ray raises."""
        target = call.target
        if call.method == "nodes":
            return [self._describe(node) for _, node in sorted(self._nodes().items())]
        if call.method == "check_alone":
            return self._check_alone(call.cluster_id)
        if call.method == "end_all":
            return self._end_all(call.cluster_id, call.timeout_s)
        assert target is not None
        name = actor_name(call.cluster_id, target.name)
        if call.method == "start":
            assert call.launch is not None
            self._check_alone(call.cluster_id)
            return self._start(name, target, call.launch, call.timeout_s)
        if call.method == "stop":
            self._ask(name, target, lambda actor: actor.stop.remote(target.pid, call.kill))
            return None
        if call.method == "is_running":
            return self._ask(name, target, lambda actor: actor.is_running.remote(target.pid))
        return self._ask(name, target, lambda actor: actor.adopt.remote(target.pid))

    def _nodes(self) -> dict[str, dict[str, Any]]:
        """Live nodes by name. Of two with one name, Ray has not noticed yet that the older raylet is dead."""
        found: dict[str, dict[str, Any]] = {}
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            name = node["NodeName"]
            if name in found and not _is_listening(node):
                continue
            found[name] = node
        return found

    def _describe(self, node: dict[str, Any]) -> RayNode:
        resources = node["Resources"]
        gpus = self._gpus(node) if resources.get("GPU") else ()
        return RayNode(
            name=node["NodeName"],
            machine=node["NodeManagerAddress"],
            num_cores=int(resources.get("CPU", 0)),
            memory_bytes=int(resources.get("memory", 0)),
            gpu_bytes=gpus,
        )

    def _gpus(self, node: dict[str, Any]) -> tuple[int, ...]:
        """The memory of the GPUs that Ray counts on a node: asked there once."""
        ray_id = node["NodeID"]
        if ray_id not in self._gpu_bytes:
            probe = ray.remote(gpu_bytes).options(
                num_cpus=0, scheduling_strategy=_on(node), runtime_env=self._runtime_env
            )
            found = ray.get(probe.remote(), timeout=ACTOR_TIMEOUT_S)
            self._gpu_bytes[ray_id] = tuple(found[: int(node["Resources"]["GPU"])])
        return self._gpu_bytes[ray_id]

    def _node(self, target: Target) -> dict[str, Any]:
        """Raises `UnavailableError` where it is gone; Ray itself notices only after many seconds that a raylet is."""
        node = self._nodes().get(target.node_id)
        if node is None or not _is_listening(node):
            raise UnavailableError(f"Ray has no live node {target.node_id} now")
        return node

    def _check_alone(self, cluster_id: str) -> None:
        """Raises `ConfigError` where another cluster of this name has actors: on a node of both, it has our files too.

        A worker that starts takes the place of the process whose id stands in its file.
        """
        if others := [name for name in self._actor_names() if owner_of(name) != cluster_id]:
            workers = ", ".join(sorted({name.rpartition(":")[2] for name in others}))
            cluster = self._connect.cluster_name
            raise ConfigError(
                f"another cluster called {cluster} has workers on this Ray ({workers}): choose another --cluster-name, "
                "or end that one with `foretoken cluster down` where it was started; where it was killed its workers "
                "end within its orphan_timeout_s. If it is this one, start it with the same store, or the same home on "
                "the same machine",
                param="cluster_name",
            )

    def _start(self, name: str, target: Target, launch: str, timeout_s: float) -> Announcement:
        node = self._node(target)
        actor = self._new_actor(name, target, node)
        host = self._connect.host or node["NodeManagerAddress"]
        connect = self._connect
        started = actor.start.remote(
            launch, connect.logs_dir, host, connect.packages, connect.command, connect.start_timeout_s
        )
        answer: Answer = ray.get(started, timeout=timeout_s)
        code, text = answer
        if code:
            self._forget(name)
            raise by_code(code)(text)
        return msgspec.json.decode(text, type=Announcement)

    def _ask(self, name: str, target: Target, question: Callable[[Any], Any]) -> Any:
        """Ask the worker's actor `name`, or a new one on its node where the old one is gone."""
        node = self._node(target)
        actor = self._known_actor(name)
        if actor is not None:
            with suppress(RayActorError, GetTimeoutError):
                return ray.get(question(actor), timeout=ACTOR_TIMEOUT_S)
        actor = self._new_actor(name, target, node)
        is_there = ray.get(actor.adopt.remote(target.pid), timeout=ACTOR_TIMEOUT_S)
        answer = ray.get(question(actor), timeout=ACTOR_TIMEOUT_S)
        if not is_there:
            self._forget(name)
        return answer

    def _known_actor(self, name: str) -> Any | None:
        with suppress(ValueError):
            return ray.get_actor(name)
        return None

    def _new_actor(self, name: str, target: Target, node: dict[str, Any]) -> Any:
        """An actor called `name` on the worker's node; the one before it ends first. Its worker's process does not."""
        options: dict[str, Any] = {
            "name": name,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_concurrency": ACTOR_CONCURRENCY,
            "num_cpus": ACTOR_CPUS,
            "scheduling_strategy": _on(node),
            "runtime_env": self._runtime_env,
        }
        if target.device_id.startswith("cuda"):
            index = int(target.device_id.partition(":")[2] or 0)
            options["num_gpus"] = gpu_share(target.memory_bytes, self._gpus(node), index)
        else:
            options["memory"] = target.memory_bytes
        with self._lock:
            self._forget(name)
            deadline = time.monotonic() + NAME_TIMEOUT_S
            while True:
                try:
                    actor = ray.remote(WorkerActor).options(**options).remote(target.name)
                    break
                except ValueError:  # the name is still taken
                    if time.monotonic() > deadline:
                        raise UnavailableError(f"Ray does not let go of the actor {name}") from None
                    time.sleep(POLL_S)
        try:
            ray.get(actor.ready.remote(), timeout=ACTOR_TIMEOUT_S)
        except GetTimeoutError:
            ray.kill(actor)
            raise UnavailableError(
                f"Ray did not start the actor of {target.name} on {target.node_id} within {ACTOR_TIMEOUT_S:g} s: "
                "what it reserves may not be free there"
            ) from None
        except ActorUnschedulableError:
            raise UnavailableError(f"the node {target.node_id} is gone") from None
        return actor

    def _forget(self, name: str) -> None:
        """End the actor of that name; its worker's process goes on."""
        with suppress(ValueError, RayError):
            ray.kill(ray.get_actor(name))

    def _end_all(self, cluster_id: str, timeout_s: float) -> int:
        """SIGTERM, and SIGKILL near the deadline, to every process that the cluster's actors watch; then those end.

        However many do not answer, that takes no longer than `timeout_s`.
        """
        names = [name for name in self._actor_names() if owner_of(name) == cluster_id]
        actors = {name: actor for name in names if (actor := self._known_actor(name)) is not None}
        kill_at = time.monotonic() + max(0.0, timeout_s - CALL_TIMEOUT_S)
        stopped = [actor.stop.remote(0, False) for actor in actors.values()]
        num_there = sum(_answers(stopped, ACTOR_TIMEOUT_S / 2).values())
        silent = set(actors)
        while silent and time.monotonic() < kill_at:
            asked = {actors[name].is_idle.remote(): name for name in silent}
            idle = _answers(list(asked), min(ACTOR_TIMEOUT_S, max(POLL_S, kill_at - time.monotonic())), if_gone=True)
            silent -= {asked[reference] for reference, is_idle in idle.items() if is_idle}
            time.sleep(POLL_S)
        _answers([actors[name].stop.remote(0, True) for name in silent], ACTOR_TIMEOUT_S / 2)
        for name in actors:
            self._forget(name)
        return num_there

    def _actor_names(self) -> list[str]:
        """Of every cluster of this name."""
        entries = ray.util.list_named_actors(all_namespaces=True)
        return [entry["name"] for entry in entries if entry["namespace"] == self._connect.namespace]


def actor_name(cluster_id: str, worker_name: str) -> str:
    """In Ray, within the namespace of the clusters of one name."""
    return f"{cluster_id}:{worker_name}"


def owner_of(name: str) -> str:
    """The id of the cluster whose actor is called `name`."""
    return name.rpartition(":")[0]


def gpu_share(memory_bytes: int, gpu_bytes: tuple[int, ...], index: int) -> float:
    """What a worker reserves of a GPU: its share of the memory, in Ray's steps of 0.0001."""
    if index >= len(gpu_bytes) or not gpu_bytes[index]:
        return 1.0
    return min(1.0, max(0.0001, round(memory_bytes / gpu_bytes[index], 4)))


def _on(node: dict[str, Any]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _answers(references: list[Any], timeout_s: float, *, if_gone: bool = False) -> dict[Any, bool]:
    """What actors have answered after `timeout_s`, all of them together; `if_gone` for one that has ended."""
    answers: dict[Any, bool] = {}
    done = ray.wait(references, num_returns=len(references), timeout=timeout_s)[0] if references else []
    for reference in done:
        try:
            answers[reference] = bool(ray.get(reference, timeout=0))
        except RayError:
            answers[reference] = if_gone
    return answers


def _is_listening(node: dict[str, Any]) -> bool:
    try:
        _probe(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    except UnavailableError:
        return False
    return True


def _probe(address: str) -> None:
    """Raises `UnavailableError` where nothing listens: Ray itself would wait for it much longer."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise UnavailableError(f"nothing answers at {address}: {error}") from None


def _in_job() -> bool:
    """Whether this process belongs to a Ray job that brought its own folder."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return bool((config.get("runtime_env") or {}).get("working_dir"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Replies:
    """Writes replies, whole lines, from any thread."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._lock = threading.Lock()

    def send(self, reply: Reply) -> None:
        line = msgspec.json.encode(reply).decode()
        with self._lock, suppress(OSError, ValueError):
            self._output.write(line + "\n")
            self._output.flush()

    def send_error(self, call_id: int, error: BaseException) -> None:
        if isinstance(error, ForetokenError):
            code, message = error.code, error.message
        elif isinstance(error, GetTimeoutError):
            code, message = UnavailableError.code, "Ray did not answer in time"
        else:
            code, message = UnavailableError.code, f"Ray: {_first_line(error)}"
        self.send(Reply(id=call_id, error_code=code, error_message=message))


def serve(bridge: Bridge, replies: Replies, calls: TextIO) -> None:
    """Answer calls until there are no more."""

    def answer(call: Call) -> None:
        try:
            result = bridge.answer(call)
        except Exception as error:  # whatever Ray raises is an answer too
            replies.send_error(call.id, error)
        else:
            replies.send(Reply(id=call.id, result=msgspec.Raw(msgspec.json.encode(result))))

    pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="call")
    for line in calls:
        pool.submit(answer, msgspec.json.decode(line, type=Call))


def main() -> None:
    """Connect, answer, and end without waiting for what is still open."""
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(RECONNECT_TIMEOUT_S))
    replies = Replies(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # what Ray prints must not stand among the replies
    bridge = Bridge(msgspec.json.decode(sys.stdin.readline(), type=Connect))
    try:
        bridge.connect()
    except UnavailableError as error:
        replies.send_error(0, error)
        os._exit(1)
    replies.send(Reply(id=0))
    serve(bridge, replies, sys.stdin)
    os._exit(0)


if __name__ == "__main__":
    main()
