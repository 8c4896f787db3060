"""The loop that makes the cluster match its placement: observe, decide (`reconcile`), act once, repeat.

It keeps no truth of its own. What runs is known from workers' reports and from the launcher, what was started from
the store; a controller that takes over finds out and goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import replace
from functools import partial

import msgspec

from cluster.config import Settings
from cluster.control.cluster_launch import HEARTBEATS, cluster_launch, demand_for, most_kv_bytes
from cluster.control.launch import backoff_s
from cluster.control.launcher import Launcher
from cluster.control.leadership import LEASES, LOOKS, Leadership, LostLeadError
from cluster.control.model import Model
from cluster.control.placement import PlacedWorker
from cluster.control.plan import Action, Decision, End, Forget, Observed, Plan, Send, Start, Terms, gist, placement_of
from cluster.control.reconcile import reconcile
from cluster.control.registry import Registry, decode_placement, encode_placement
from cluster.control.restarts import Restarts
from cluster.control.roster import Member, Roster
from cluster.control.status import cluster_status, conditions
from cluster.control.topology import Node, Topology
from cluster.errors import ForetokenError, StoreUnavailableError, UnavailableError
from cluster.machine import Machine
from cluster.protocol import ClusterStatus, ModelShape, WorkerRecord, WorkerReport
from cluster.store.base import Store

logger = logging.getLogger(__name__)

IDLE_S = 0.5  # between two decisions where nothing is new
STATUS_S = 0.5  # between two writes of the status, unless a condition changed
STORE_S = 1.0  # between two looks whether the store still holds what it should
NODES_S = 1.0  # between two looks at the nodes
PODS_WAIT_S = 30.0  # the first pods wait so long for the others before the experts are shared out
END_EXTRA_S = 2.0  # for workers to end, beside what runs
END_POLL_S = 0.05
VERSION_BITS = 24  # of an order's version, below the epoch: never the same for two controllers


class Controller:
    """Leads one cluster, from `run` to its end."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        launcher: Launcher,
        model: Model,
        shape: ModelShape,
        machine: Machine,
        backoff: Callable[[int], float] = backoff_s,
    ) -> None:
        self.controller_id = uuid.uuid4().hex
        self._settings = settings
        self._launcher = launcher
        self._model = model
        self._machine = machine
        self._tick_s = settings.lease_s / HEARTBEATS
        self._terms = Terms(shape, demand_for(settings, shape), settings.lease_s, most_kv_bytes(settings, shape))
        self._leadership = Leadership(store, self.controller_id, lease_s=settings.lease_s)
        self._registry = Registry(store, owns_workers=launcher.starts_workers)
        self._restarts = Restarts(backoff)
        self._roster = Roster(
            token=settings.token.get_secret_value() if settings.token is not None else None,
            lead=lambda: self._leadership.message,
            heartbeat_s=self._tick_s,
            lease_s=settings.lease_s,
            on_news=lambda: self._news.set(),
            on_refused=self._on_refused,
        )
        self._plan = Plan()
        self._decision: Decision | None = None  # the last one
        self._decided_at = 0.0
        self._gist: object = None  # of what it was made from
        self._nodes: dict[str, Node] = {}  # all that were ever seen, as they were before workers ran on them
        self._node_ids: frozenset[str] | None = None  # those that are there; None: not known yet
        self._jobs: dict[Hashable, asyncio.Task[None]] = {}  # what runs beside the loop, one of a kind
        self._news = asyncio.Event()
        self._lost_lead: LostLeadError | None = None
        self._highest_epoch = 0  # that a worker named
        self._is_taking_over = True
        self._launcher_problem: str | None = None
        self._status: ClusterStatus | None = None
        self._started_at = time.monotonic()

    async def run(self, stop: asyncio.Event) -> None:
        """Lead until `stop`; then end the workers, where it is us who start them.

        Raises `LostLeadError` where another controller leads; workers go on.
        """
        if not await self._leadership.acquire(stop.is_set):
            return
        self._job("stop", partial(self._watch_stop, stop))
        try:
            if await self._take_over(stop):
                await self._lead(stop)
                if self._launcher.starts_workers:
                    await self._end_workers()
            await self._leadership.resign()
        finally:
            await self._let_go()

    async def _lead(self, stop: asyncio.Event) -> None:
        self._job("store", self._look_after_store)
        self._job("nodes", self._look_at_nodes)
        last = time.monotonic()
        while not stop.is_set():
            now = time.monotonic()
            # Time in which we did not run does not count: what was reported then is yet to be read.
            self._roster.age(min(now - last, 2 * self._tick_s))
            last = now
            await self._tick(now)
            await self._wait_for_news()

    # ------------------------------------------------------------------------------------------------------ taking over

    async def _take_over(self, stop: asyncio.Event) -> bool:
        """Find what runs already, and an epoch that all of it obeys; False where `stop` came first."""
        while (stored := await self._load()) is None:
            if stop.is_set():
                return False
            await self._wait_for_news()
        records, placement = stored
        if placement is not None:
            try:
                placed, topology = decode_placement(placement)
                self._plan = replace(self._plan, placement=placed)
                self._nodes = {node.id: node for node in topology.nodes}
            except msgspec.MsgspecError as error:
                logger.warning("the stored placement cannot be read: %s", error)
        for name, record in records.items():
            if await self._can_adopt(record):
                self._roster.add(record, is_adopted=True)
                logger.info("adopted %s, process %d on %s", name, record.pid, record.node_id)
        if self._plan.placement is None and records:
            self._plan = replace(self._plan, placement=placement_of(self._roster.records.values()))
        deadline = time.monotonic() + self._settings.lease_s
        while any(member.report is None for member in self._roster) and time.monotonic() < deadline:
            await self._wait_for_news()
            if self._highest_epoch >= self._leadership.epoch:
                await self._leadership.raise_above(self._highest_epoch)
                deadline = time.monotonic() + self._settings.lease_s
        self._is_taking_over = False
        self._registry.want_workers(self._roster.records)  # what is not wanted is deleted
        self._terms = replace(self._terms, first_version=self._leadership.epoch << VERSION_BITS)
        logger.info("controller %s leads, epoch %d", self.controller_id, self._leadership.epoch)
        return not stop.is_set()

    async def _load(self) -> tuple[dict[str, WorkerRecord], bytes | None] | None:
        try:
            return await self._registry.load()
        except StoreUnavailableError as error:
            logger.warning("waiting for the store: %s", error.message)
            return None

    async def _can_adopt(self, record: WorkerRecord) -> bool:
        try:
            return await self._launcher.adopt(record)
        except UnavailableError:
            return True  # nobody can say: its reports will tell

    def _on_refused(self, report: WorkerReport) -> None:
        """A worker obeys another controller."""
        if report.epoch < self._leadership.epoch:
            return  # it has yet to hear of the epoch that was taken since
        self._highest_epoch = max(self._highest_epoch, report.epoch)
        if not self._is_taking_over:
            self._lost_lead = LostLeadError(
                f"{report.name} obeys another controller, with epoch {report.epoch}; ours is {self._leadership.epoch}"
            )
        self._news.set()

    # -------------------------------------------------------------------------------------------------------- observing

    async def _watch_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._news.set()

    async def _wait_for_news(self) -> None:
        """Until something happened, or a tick."""
        try:
            async with asyncio.timeout(self._tick_s):
                await self._news.wait()
        except TimeoutError:
            return
        finally:
            self._news.clear()

    async def _look_after_store(self) -> None:
        """Keep the lead, and the store as it should be; where others start workers, see who is there."""
        pause_s = LEASES * self._settings.lease_s / LOOKS
        wrote_at = 0.0
        while True:
            try:
                await self._leadership.renew()
            except LostLeadError as error:
                self._lost_lead = error
                self._news.set()
                return
            if time.monotonic() - wrote_at > STORE_S:
                wrote_at = time.monotonic()
                await self._registry.try_sync()
            if not self._launcher.starts_workers:
                await self._look_at_registered()
            await asyncio.sleep(pause_s)

    async def _look_at_registered(self) -> None:
        try:
            records = await self._registry.records()
        except StoreUnavailableError:
            return
        for record in records.values():
            if self._roster.get(record) is None:
                self._roster.add(record, is_adopted=True)
                self._news.set()
        for member in self._roster:
            # A store that came back empty is told again by its workers: one that reports is there.
            if member.record.name not in records and member.silent_s > self._settings.lease_s:
                self._roster.remove(member)
                self._news.set()

    async def _look_at_nodes(self) -> None:
        while True:
            try:
                topology = await self._launcher.topology()
            except UnavailableError as error:
                self._set_launcher_problem(error.message)
            else:
                self._set_launcher_problem(None)
                found = {node.id: node for node in topology.nodes}
                self._nodes = found | self._nodes if self._launcher.starts_workers else found
                if found.keys() != self._node_ids:
                    logger.info("nodes: %s", ", ".join(found) or "none")
                    self._node_ids = frozenset(found)
                    self._news.set()
            await asyncio.sleep(NODES_S)

    def _set_launcher_problem(self, problem: str | None) -> None:
        if problem is not None and problem != self._launcher_problem:
            logger.warning("%s", problem)
        self._launcher_problem = problem

    async def _ask_launcher(self, member: Member) -> None:
        """Whether a worker that says nothing still has a process."""
        try:
            is_running = await self._launcher.is_running(member.record)
        except UnavailableError:
            return  # nobody can say
        if not is_running:
            member.is_running = False
            self._news.set()

    def _observe(self, now_s: float) -> Observed:
        seen = self._roster.seen
        # A node that the launcher does not name is there while one of its workers reports.
        reporting = {w.record.node_id for w in seen.values() if w.report and w.silent_s <= self._settings.lease_s}
        there = [node for node in self._nodes.values() if node.id in (self._node_ids or ()) or node.id in reporting]
        return Observed(
            now_s=now_s,
            topology=Topology(tuple(there)),
            workers=seen,
            starting=self._starting(now_s) - seen.keys(),
            resting=self._restarts.resting(now_s),
            starts_workers=self._launcher.starts_workers,
        )

    def _starting(self, now_s: float) -> frozenset[str]:
        if self._launcher.starts_workers:
            return frozenset(key[1] for key in self._jobs if isinstance(key, tuple) and key[0] == "start")
        if now_s - self._started_at > PODS_WAIT_S:
            return frozenset()
        num_there = sum(member.record.role == "expert" for member in self._roster)
        return frozenset(f"expert-new-{i}" for i in range(num_there, self._terms.demand.num_expert_workers))

    # ----------------------------------------------------------------------------------------------------------- acting

    async def _tick(self, now_s: float) -> None:
        if self._lost_lead is not None:
            raise self._lost_lead
        for member in self._roster:
            if member.is_running and (member.is_suspect or member.silent_s > self._settings.lease_s):
                member.is_suspect = False
                self._job(("ask", member.record.worker_id), partial(self._ask_launcher, member))
        if self._node_ids is None and self._launcher_problem is None:
            return  # the first look at the nodes is under way
        observed = self._observe(now_s)
        news = gist(self._terms, observed)
        # Over the thousands of experts of a large model it takes a while; where nothing is new it only looks at clocks.
        if self._decision is None or self._decision.actions or news != self._gist or now_s - self._decided_at > IDLE_S:
            self._gist, self._decided_at = news, now_s
            self._decision = await asyncio.to_thread(reconcile, self._terms, observed, self._plan)
            self._plan = self._decision.plan
            for action in self._decision.actions:
                self._act(action)
        found = self._restarts.problem() or self._launcher_problem or self._roster.refusal()
        self._publish(observed, found or self._decision.problem)

    def _act(self, action: Action) -> None:
        if isinstance(action, Start):
            self._job(("start", action.worker.id), partial(self._start, action.worker))
        elif isinstance(action, End):
            self._job(("end", action.record.worker_id), partial(self._end, action.record, kill=action.kill))
        elif isinstance(action, Forget):
            self._forget(action.record)
        elif isinstance(action, Send):
            self._roster.send(action.name, action.worker_id, action.message)

    def _job(self, key: Hashable, run: Callable[[], Awaitable[None]]) -> None:
        """Run something beside the loop, unless the like runs already."""

        async def job() -> None:
            try:
                await run()
            except Exception:
                logger.exception("the controller's job %s failed", key)
                await asyncio.sleep(self._tick_s)  # before the loop orders it again
            finally:
                del self._jobs[key]

        if key not in self._jobs:
            self._jobs[key] = asyncio.get_running_loop().create_task(job())

    async def _start(self, worker: PlacedWorker) -> None:
        assert self._plan.placement is not None
        topology = Topology(tuple(self._nodes.values()))
        launch = cluster_launch(self._settings, self._model, worker, self._plan.placement, topology, self._machine)
        logger.info("starting %s on %s", worker.id, worker.node_id)
        try:
            record = await self._launcher.start(worker, launch)
        except ForetokenError as error:
            logger.error("%s could not be started: %s", worker.id, error.message)
            is_workers = type(error) is not UnavailableError  # otherwise it is the launcher that cannot be reached
            self._restarts.note_failure(worker.id, time.monotonic(), error.message if is_workers else "")
        else:
            logger.info("%s serves on %s, process %d", worker.id, record.address, record.pid)
            self._restarts.note_start(worker.id)
            self._roster.add(record, is_adopted=False)
        self._news.set()

    async def _end(self, record: WorkerRecord, *, kill: bool) -> None:
        logger.warning("%s %s, process %d", "killing" if kill else "ending", record.name, record.pid)
        is_told = False
        while not is_told and self._roster.get(record) is not None:
            try:
                await self._launcher.stop(record, kill=kill)
                is_told = True
            except UnavailableError as error:
                logger.warning("%s was not ended yet: %s", record.name, error.message)
            await asyncio.sleep(self._settings.lease_s)  # before it is done again

    def _forget(self, record: WorkerRecord) -> None:
        member = self._roster.get(record)
        if member is not None:
            logger.warning("%s is gone, process %d on %s", record.name, record.pid, record.node_id)
            self._roster.remove(member)
            now_s = time.monotonic()
            self._restarts.note_death(record.name, now_s, now_s - member.since_s)
            self._news.set()

    def _publish(self, observed: Observed, problem: str | None) -> None:
        """Say what the store should hold from now on."""
        self._registry.want_workers(self._roster.records)
        if self._plan.placement is not None and self._launcher.starts_workers:
            self._registry.want_placement(encode_placement(self._plan.placement, self._nodes.values()))
        lead, before = self._leadership.message, self._status
        status = cluster_status(
            self._settings.cluster_name, self._model.name, lead, self._terms, observed, self._plan, problem
        )
        is_news = before is None or conditions(before) != conditions(status)
        if is_news or (before is not None and status.at_s - before.at_s > STATUS_S):
            is_starting = any(worker.condition == "starting" for worker in status.workers)
            if problem is not None and not is_starting and (before is None or before.problem != problem):
                logger.warning("%s", problem)
            self._status = status
            self._registry.want_status(status)
            self._job("sync", self._sync)

    async def _sync(self) -> None:
        await self._registry.try_sync()

    # ---------------------------------------------------------------------------------------------------------- the end

    async def _end_workers(self) -> None:
        """End all workers; those with requests first, while the experts that they need are there."""
        logger.info("stopping: ending the workers")
        await self._cancel_jobs("start")
        for role, timeout_s in (("attention", self._settings.drain_timeout_s + END_EXTRA_S), ("expert", END_EXTRA_S)):
            members = [member for member in self._roster if member.record.role == role]
            await asyncio.gather(*(self._end_worker(member, timeout_s) for member in members))
        self._registry.want_workers({})
        if self._status is not None:
            self._registry.want_status(msgspec.structs.replace(self._status, workers=(), at_s=time.time()))
        await self._registry.try_sync()

    async def _end_worker(self, member: Member, timeout_s: float) -> None:
        record = member.record
        deadline = time.monotonic() + timeout_s
        try:
            await self._launcher.stop(record, kill=False)
            while await self._launcher.is_running(record):
                if time.monotonic() > deadline:
                    logger.warning("%s did not end in time and was killed", record.name)
                    await self._launcher.stop(record, kill=True)
                    break
                await asyncio.sleep(END_POLL_S)
        except UnavailableError as error:
            logger.warning("%s was left to end by itself: %s", record.name, error.message)
        self._roster.remove(member)

    async def _let_go(self) -> None:
        await self._cancel_jobs()
        await self._roster.close()

    async def _cancel_jobs(self, kind: str | None = None) -> None:
        jobs = [job for key, job in self._jobs.items() if kind is None or (isinstance(key, tuple) and key[0] == kind)]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
