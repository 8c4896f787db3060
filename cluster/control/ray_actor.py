"""The actor beside each worker: it reserves what the worker uses, starts its process on its node, and watches it.

The process is no child of the actor's: it lives on when the actor is killed or its raylet dies, and another actor
takes it over. Answers are plain values: an error is its code and message.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cluster.control import detached
from cluster.control.launch import worker_environment
from cluster.environment import PACKAGES
from cluster.errors import CheckpointError, ForetokenError
from cluster.machine import this_machine
from cluster.protocol import Launch

POLL_S = 0.2
LINGER_S = 10.0  # an actor whose process has ended still answers for so long, then ends as well
NOT_FOR_WORKERS = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")  # Ray puts them there for the actor: one thread

Answer = tuple[str, str]  # ("", result) or (error code, message)


class WorkerActor:
    """One worker's guard. Calls may overlap (`max_concurrency`): `stop` reaches a start that is under way."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = 0
        self._is_starting = False
        self._give_up = threading.Event()

    def ready(self) -> bool:
        """Answers once the actor runs."""
        return True

    def start(
        self, launch_json: str, logs_dir: str, host: str, packages: str, command: tuple[str, ...], timeout_s: float
    ) -> Answer:
        """Start the worker, listening on `host`; its `Announcement` as JSON. Blocks until it serves.

        `packages`: where our code lies on the machine that asks; what is below it is looked for below ours.
        """
        self._is_starting = True
        try:
            launch = _on_this_node(msgspec.json.decode(launch_json, type=Launch), host, packages)
            machine = this_machine()
            if launch.host_memory_bytes is None:
                launch = msgspec.structs.replace(launch, host_memory_bytes=machine.available_bytes)
            announced = detached.start_detached(
                launch,
                worker_environment(launch, machine, for_workers(os.environ)),
                Path(logs_dir) / f"{launch.name}.log",
                timeout_s,
                command=command,
                give_up=self._give_up,
            )
        except ForetokenError as error:
            return error.code, error.message
        except OSError as error:
            return ForetokenError.code, f"{launch.name} could not be started: {error}"
        finally:
            self._is_starting = False
        self._watch(announced.pid)
        return "", msgspec.json.encode(announced).decode()

    def adopt(self, pid: int) -> bool:
        """Watch a process that runs already; False: it is not there."""
        if not detached.is_running(pid, self._name):
            return False
        self._watch(pid)
        return True

    def is_running(self, pid: int) -> bool:
        return detached.is_running(pid, self._name)

    def stop(self, pid: int, kill: bool) -> bool:
        """Signal the process (0: the one that is watched) and any start that is under way; whether there was one."""
        self._give_up.set()
        pid = pid or self._pid
        was_there = self._is_starting or detached.is_running(pid, self._name)
        detached.end(pid, self._name, kill=kill)
        return was_there

    def is_idle(self) -> bool:
        """Neither a process nor the start of one."""
        return not self._is_starting and not detached.is_running(self._pid, self._name)

    def _watch(self, pid: int) -> None:
        self._pid = pid
        threading.Thread(target=self._end_after, args=(pid,), daemon=True).start()

    def _end_after(self, pid: int) -> None:
        """End this actor some time after its process, so that nothing stays reserved."""
        while detached.is_running(pid, self._name):
            time.sleep(POLL_S)
        time.sleep(LINGER_S)
        if self._pid == pid:
            os._exit(0)


def for_workers(environment: Mapping[str, str]) -> dict[str, str]:
    """An actor's environment without what Ray put there and no `child_environment` leaves out."""
    return {name: value for name, value in environment.items() if name not in NOT_FOR_WORKERS}


def _on_this_node(launch: Launch, host: str, packages: str) -> Launch:
    """`launch` with what only this node knows. Raises `CheckpointError` where the model is not here."""
    path = Path(launch.model_path)
    if not path.is_dir() and path.is_relative_to(packages):
        path = PACKAGES / path.relative_to(packages)
    if not path.is_dir():
        raise CheckpointError(
            f"{launch.model_path} is not on the node {launch.node_id}: put the model on a disk that all nodes share, "
            "or at the same path on each"
        )
    return msgspec.structs.replace(launch, model_path=str(path), address=f"{host}:0", tensor_host=host)
