"""Kinds of faults that `loadtests/kill.py` brings about: whom they strike, with which signal, and for how long."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.operate.children import in_session
from cluster.protocol import Role
from loadtests.cluster_process import LocalCluster
from loadtests.processes import BenchError

# Ray's nodes give up a lost head after this time, instead of a minute: the head stays away for longer.
RECONNECT_S = 3
AWAY_S = 8.0
ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S)}
POLL_S = 0.05


@dataclass(frozen=True)
class Kind:
    """One kind. `prepare` chooses whom it strikes and gives the stroke."""

    name: str
    choose: Callable[[LocalCluster, random.Random], list[int]]  # process ids, empty: nobody is there to be struck
    number: signal.Signals
    away: str = ""  # this child of the supervisor is struck again whenever it is back, for `AWAY_S`

    @property
    def lasts_s(self) -> float:
        """Until whom it strikes may come back."""
        return AWAY_S if self.away else 0.0

    def impossible(self, cluster: LocalCluster) -> str:
        """Why this machine cannot do it; "": it can."""
        return "" if self.choose(cluster, random.Random(0)) else "no process of this kind runs here"

    def prepare(self, cluster: LocalCluster, rng: random.Random) -> Callable[[], None]:
        """Whom it strikes is decided now, so that the stroke itself takes no time. Raises `BenchError`."""
        pids = self.choose(cluster, rng)
        if not pids:
            raise BenchError(f"{self.name}: no process of this kind runs")

        def strike() -> None:
            for pid in pids:
                _send(pid, self.number)
            if self.away:
                threading.Thread(target=_keep_away, args=(cluster, self.away), daemon=True).start()

        return strike


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _keep_away(cluster: LocalCluster, name: str) -> None:
    end = time.monotonic() + AWAY_S
    while time.monotonic() < end:
        with contextlib.suppress(BenchError):
            for pid in _process(name)(cluster, random.Random(0)):
                _send(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _worker(role: Role) -> Callable[[LocalCluster, random.Random], list[int]]:
    """One serving worker of a role."""

    def choose(cluster: LocalCluster, rng: random.Random) -> list[int]:
        pids = sorted(cluster.pids(role))
        return [rng.choice(pids)] if pids else []

    return choose


def _process(name: str) -> Callable[[LocalCluster, random.Random], list[int]]:
    """A child of the supervisor, with all that runs in its session."""

    def choose(cluster: LocalCluster, _rng: random.Random) -> list[int]:
        pid = cluster.process(name)
        return [] if pid is None else in_session(pid)

    return choose


KINDS = (
    Kind("expert", _worker("expert"), signal.SIGKILL),
    Kind("expert_hung", _worker("expert"), signal.SIGSTOP),
    Kind("attention", _worker("attention"), signal.SIGKILL),
    Kind("attention_hung", _worker("attention"), signal.SIGSTOP),
    Kind("controller", _process("controller"), signal.SIGKILL),
    Kind("redis", _process("redis"), signal.SIGKILL),
    Kind("ray_head", _process("ray-0"), signal.SIGKILL, away="ray-0"),
)
