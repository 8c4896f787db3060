"""Kinds of faults that `loadtests/kill.py` brings about: whom they strike, with which signal, and how it is known that
they struck, and that the cluster got over it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from dataclasses import dataclass

from cluster.operate.children import in_session
from cluster.store.records import ClusterStatus
from loadtests.cluster_process import LocalCluster
from loadtests.processes import BenchError, get

# Ray's nodes give up a lost head after this time, instead of a minute: the head stays away for longer.
RECONNECT_S = 3
AWAY_S = 8.0
ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S)}
POLL_S = 0.05
WATCH_S = 0.25  # between two looks at what becomes of the cluster
WHOLE_S = 180.0  # until a cluster is whole again
WORKING = re.compile(r'^foretoken:worker_num_requests_(?:running|waiting)\{.*worker="([^"]+)".*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Look:
    """Which process is who at one moment, and what has been counted."""

    at_s: float  # time.time(), of the status
    epoch: int
    children: dict[str, int]  # process ids, by name
    workers: dict[str, int]  # of the serving ones
    num_resumed: int

    def pid(self, name: str) -> int | None:
        return self.children.get(name) or self.workers.get(name)


def look(cluster: LocalCluster) -> Look | None:
    """None while the store or the gateway cannot be read. Raises `BenchError` where the cluster has ended."""
    children, status = cluster.children(), cluster.status()
    try:
        return None if status is None else seen(status, children, cluster.num_resumed())
    except BenchError:
        return None


def seen(status: ClusterStatus, children: dict[str, int], num_resumed: int) -> Look:
    workers = {worker.name: worker.pid for worker in status.workers if worker.condition == "serving"}
    return Look(status.at_s, status.epoch, children, workers, num_resumed)


@dataclass(frozen=True)
class Stroke:
    """A signal that was sent."""

    name: str  # of the worker or child
    at_s: float  # time.monotonic()
    wall_s: float  # time.time()
    is_delivered: bool


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    target: str  # a worker's role, or the name of a child of the supervisor
    number: signal.Signals
    may_pause: bool  # False: streams go on without a pause, and are sent again until the cluster is whole again
    also: str = ""  # the name of a child that is struck at the same moment
    also_number: signal.Signals | None = None  # with which signal; None: the same
    leads_anew: bool = False  # another controller must lead, before workers end for want of one
    breaks_streams: bool = False  # they end with whom it strikes, cut off; sent again afterwards they are whole
    is_kept_away: bool = False  # it is struck again whenever it is back, for `AWAY_S`
    copies: int = 1  # of each expert, in a cluster of its own
    is_long: bool = False  # one request alone, as long as the model's context
    goal_s: float | None = None  # of the pause, at the 99th percentile
    note: str = ""  # what is measured that the name does not say

    @property
    def of_worker(self) -> bool:
        return self.target in ("attention", "expert")

    def names(self, now: Look) -> list[str]:
        """Whom it could strike."""
        there = now.workers if self.of_worker else now.children
        return sorted(name for name in there if name == self.target or name.startswith(f"{self.target}-"))

    def choose(self, cluster: LocalCluster, before: Look, rng: random.Random) -> str | None:
        """Whom it strikes now; an attention worker only while it has requests. None: nobody."""
        names = self.names(before)
        if self.target == "attention":
            at_work = working(get(cluster.url, "/metrics").decode())
            names = [name for name in names if name in at_work]
        return rng.choice(names) if names else None

    def strike(self, before: Look, name: str) -> Stroke:
        at_s, wall_s = time.monotonic(), time.time()
        delivered = [self._signal(before, each, number) for each, number in self._struck(name).items()]
        return Stroke(name, at_s, wall_s, all(delivered))

    def _struck(self, name: str) -> dict[str, signal.Signals]:
        """Each with its signal."""
        also = {self.also: self.also_number or self.number} if self.also else {}
        return also | {name: self.number}

    def _signal(self, before: Look, name: str, number: signal.Signals) -> bool:
        pid = before.pid(name)
        assert pid is not None
        is_delivered = _send(pid, number)
        if number == signal.SIGKILL and name in before.children:
            for other in in_session(pid):  # what it started dies with it
                _send(other, number)
        return is_delivered

    def within_s(self, cluster: LocalCluster) -> float:
        """The cluster must have got over it after so long."""
        return cluster.settings.orphan_timeout_s if self.leads_anew else WHOLE_S

    def problem(self, before: Look, now: Look | None, stroke: Stroke) -> str:
        """What the cluster has not done about it yet; "": nothing."""
        if now is None or now.at_s < stroke.wall_s:
            return "no fresh status"
        for name in self._struck(stroke.name):
            if now.pid(name) in (None, before.pid(name)):
                return f"{name} has not been started again"
        return "no other controller leads" if self.leads_anew and now.epoch <= before.epoch else ""

    def missed(self, before: Look, after: Look, stroke: Stroke) -> str:
        """Why it struck nothing, though the signal was sent; "": it did."""
        if not stroke.is_delivered:
            return f"{stroke.name} had ended before the signal came"
        if self.target == "attention" and after.num_resumed <= before.num_resumed:
            return f"no request had to leave {stroke.name}"
        if self.is_kept_away:
            nodes = [name for name in before.children if name.startswith("ray-") and name != self.target]
            if outlived := [name for name in nodes if after.children.get(name) == before.children[name]]:
                return f"{', '.join(outlived)} outlived the head's absence"
        return ""

    def keep_away(self, cluster: LocalCluster, stroke: Stroke) -> None:
        while time.monotonic() < stroke.at_s + AWAY_S:
            if (pid := cluster.children().get(stroke.name)) is not None:
                for each in in_session(pid):
                    _send(each, signal.SIGKILL)
            time.sleep(POLL_S)

    def wait_over(self, cluster: LocalCluster, before: Look, stroke: Stroke) -> tuple[Look, float]:
        """Until whom it struck is there again and the cluster is whole; what that looks like, and seconds since.

        Raises `BenchError` where that takes too long.
        """
        if self.is_kept_away:
            self.keep_away(cluster, stroke)
        within_s = self.within_s(cluster)
        while True:
            now = look(cluster)
            seconds = time.monotonic() - stroke.at_s
            problem = self.problem(before, now, stroke) or cluster.problem()
            if now is not None and not problem:
                return now, seconds
            if seconds > within_s:
                raise BenchError(f"{self.name}: {seconds:.0f} s after {stroke.name} was struck: {problem}")
            time.sleep(WATCH_S)


def working(metrics: str) -> set[str]:
    """The attention workers that have requests, by the gateway's page of metrics."""
    return {name for name, count in WORKING.findall(metrics) if float(count) > 0}


def _send(pid: int, number: signal.Signals) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


KINDS = (
    Kind("expert", "expert", signal.SIGKILL, may_pause=True),
    Kind("attention", "attention", signal.SIGKILL, may_pause=True),
    Kind("controller", "controller", signal.SIGKILL, may_pause=False, leads_anew=True),
    Kind("redis", "redis", signal.SIGKILL, may_pause=False),
    Kind("controller_expert", "expert", signal.SIGKILL, may_pause=True, also="controller", leads_anew=True),
    Kind("expert_hung", "expert", signal.SIGSTOP, may_pause=True),
    Kind("attention_hung", "attention", signal.SIGSTOP, may_pause=True),
    Kind("controller_hung", "controller", signal.SIGSTOP, may_pause=False, leads_anew=True),
    Kind(
        "controller_hung_expert",
        "expert",
        signal.SIGKILL,
        may_pause=True,
        also="controller",
        also_number=signal.SIGSTOP,
        leads_anew=True,
    ),
    Kind("redis_hung", "redis", signal.SIGSTOP, may_pause=False),
    Kind("gateway_hung", "gateway", signal.SIGSTOP, may_pause=True, breaks_streams=True),
    Kind("ray_head", "ray-0", signal.SIGKILL, may_pause=False, is_kept_away=True),
    Kind(
        "attention_4k",
        "attention",
        signal.SIGKILL,
        may_pause=True,
        is_long=True,
        goal_s=2.0,
        note="one request, whose prompt and answer fill the demo model's context of 4096 tokens",
    ),
    Kind(
        "expert_replica",
        "expert",
        signal.SIGKILL,
        may_pause=True,
        copies=2,
        goal_s=1.0,
        note="expert_copies 2: another worker has what the killed one had",
    ),
)
