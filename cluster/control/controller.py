"""The loop that makes the cluster match its placement: observe, decide (`reconcile`), act once, repeat.

It keeps no truth of its own. What runs is known from workers' reports and from the launcher, what was started from
the store; a controller that takes over finds out and goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import msgspec

from cluster.config import Settings
from cluster.control.cluster_launch import cluster_launch, demand_for, most_kv_bytes
from cluster.control.ending import end_in_order
from cluster.control.failures import backoff_s
from cluster.control.jobs import Jobs
from cluster.control.last_known import NOTHING, Known, LastKnown
from cluster.control.launcher import Launcher
from cluster.control.leadership import Leadership, LostLeadError
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
from cluster.protocol import ModelShape, WorkerReport
from cluster.silence import HEARTBEATS, LASTING_LEASES, RENEWALS, ListeningTime
from cluster.store.base import Store
from cluster.store.records import UNREADABLE, ClusterStatus, StartFailure, WorkerRecord

logger = logging.getLogger(__name__)

IDLE_S = 0.5  # between two decisions where nothing is new
STATUS_S = 0.5  # between two writes of the status, unless a condition changed
STORE_S = 1.0  # between two looks whether the store still holds what it should
NODES_S = 1.0  # between two looks at the nodes
PODS_WAIT_S = 30.0  # the first pods wait so long for the others before the experts are shared out
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
        last_known: LastKnown | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`beat` is called each time that the loop that decides goes round: it comes less often only where that hangs.

        `last_known`: what the controller before this one, which has ended, knew of its workers.
        """
        self.controller_id = uuid.uuid4().hex
        self._settings = settings
        self._launcher = launcher
        self._model = model
        self._machine = machine
        self._tick_s = min(settings.lease_s / HEARTBEATS, IDLE_S)  # however long a lease, its loop goes round
        self._look_s = LASTING_LEASES * settings.lease_s / RENEWALS  # between two looks at the store
        self._terms = Terms(shape, demand_for(settings, shape), settings.lease_s, most_kv_bytes(settings, shape))
        self._beat = beat
        self._last_known = last_known
        self._known = last_known.read() if last_known is not None else None
        before = self._known.lead if self._known is not None else None
        self._leadership = Leadership(store, self.controller_id, lease_s=settings.lease_s, before=before)
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
        self._news = asyncio.Event()
        self._jobs = Jobs(self._tick_s, self._news.set)  # what runs beside the loop
        self._highest_epoch = 0  # that a worker named
        self._is_taking_over = True
        self._launcher_problem: str | None = None
        self._status: ClusterStatus | None = None
        self._began_at = 0.0  # to lead

    async def run(self, stop: asyncio.Event) -> None:
        """Lead until `stop`; then end the workers, where it is us who start them.

        Raises `LostLeadError` where another controller leads, and what ended a loop that leading needs; workers go on.
        """
        self._jobs.keep("stop", partial(self._watch_stop, stop))
        try:
            self._hold()
            if not await self._leadership.acquire(stop.is_set, self._beat):
                return
            self._jobs.keep("lead", self._keep_lead)
            if await self._take_over(stop):
                await self._lead(stop)
                if self._launcher.starts_workers:
                    await self._end_workers()
            await self._jobs.cancel("lead")  # which would take it back
            await self._leadership.resign()
        finally:
            await self._let_go()

    async def _lead(self, stop: asyncio.Event) -> None:
        self._jobs.keep("store", self._look_after_store)
        self._jobs.keep("nodes", self._look_at_nodes)
        listening = ListeningTime(self._tick_s)
        self._began_at = time.monotonic()
        while not stop.is_set():
            self._roster.age(listening.passed_s())
            await self._tick(time.monotonic())
            await self._wait_for_news()

    # ------------------------------------------------------------------------------------------------------ taking over

    def _hold(self) -> None:
        """Go on renewing the leases that the controller before this one kept, whoever is to lead."""
        if self._known is not None and self._known.workers:
            logger.info("holding %s as controller %s", ", ".join(self._known.workers), self._known.lead.controller_id)
            for record in self._known.workers.values():
                self._roster.add(record, is_adopted=True)

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
            except UNREADABLE as error:
                logger.warning("the stored placement cannot be read: %s", error)
        for member in self._roster:  # its stream is still the last controller's, and an order on it would be that one's
            self._roster.remove(member)
        for record in records.values():
            self._roster.add(record, is_adopted=True)
        if self._plan.placement is None and records:
            self._plan = replace(self._plan, placement=placement_of(records.values()))
        self._remember()
        for member in self._roster:  # each on its own: one that nobody can reach is waited for by nobody
            self._jobs.once(("ask", member.record.worker_id), partial(self._adopt, member))
        deadline = time.monotonic() + self._settings.lease_s
        while not all(member.is_led for member in self._roster) and time.monotonic() < deadline:
            await self._wait_for_news()
            if self._highest_epoch >= self._leadership.epoch:
                await self._leadership.raise_above(self._highest_epoch)
                self._remember()
                deadline = time.monotonic() + self._settings.lease_s
        self._is_taking_over = False
        self._registry.want_workers(self._roster.records)  # what is not wanted is deleted
        self._terms = replace(self._terms, first_version=self._leadership.epoch << VERSION_BITS)
        logger.info("controller %s leads, epoch %d", self.controller_id, self._leadership.epoch)
        return not stop.is_set()

    async def _load(self) -> tuple[dict[str, WorkerRecord], bytes | None] | None:
        """Workers and placement as they were last; None where the store cannot be reached."""
        try:
            records, placement = await self._registry.load()
        except StoreUnavailableError as error:
            logger.warning("waiting for the store: %s", error.message)
            return None
        known = self._known
        if known is not None and self._leadership.found_epoch <= known.lead.epoch:
            # Nobody has led since, so that the store is no newer, and is empty where it lost what it held.
            records |= known.workers
            placement = bytes(known.placement) if bytes(known.placement) != NOTHING else placement
        return records, placement

    def _remember(self) -> None:
        """Leave to the next controller on this machine what it needs where it does not find it in the store."""
        if self._last_known is not None:
            placement = self._encoded_placement()
            stored = msgspec.Raw(placement if placement is not None else NOTHING)
            self._last_known.write(Known(self._leadership.message, self._roster.records, stored))

    async def _adopt(self, member: Member) -> None:
        try:
            is_there = await self._launcher.adopt(member.record)
        except UnavailableError:
            return  # nobody can say: its reports will tell
        record = member.record
        if is_there:
            logger.info("adopted %s, process %d on %s", record.name, record.pid, record.node_id)
        elif self._is_taking_over:
            self._roster.remove(member)
        else:
            member.is_running = False
        self._news.set()

    def _on_refused(self, report: WorkerReport) -> None:
        """A worker obeys another controller."""
        if report.epoch < self._leadership.message.epoch:
            return  # it has yet to hear of the epoch that was taken since
        if not self._leadership.epoch:
            if report.epoch > self._leadership.message.epoch:
                self._roster.drop(report.worker_id)  # it was only held
            return
        self._highest_epoch = max(self._highest_epoch, report.epoch)
        if not self._is_taking_over:
            self._jobs.fail(
                LostLeadError(
                    f"{report.name} obeys another controller, with epoch {report.epoch}; "
                    f"ours is {self._leadership.epoch}"
                )
            )
        self._news.set()

    # -------------------------------------------------------------------------------------------------------- observing

    async def _watch_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._news.set()

    async def _wait_for_news(self) -> None:
        """Until something happened, or a tick. Raises what ended a loop that leading needs."""
        self._beat()
        try:
            async with asyncio.timeout(self._tick_s):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()
        if self._jobs.failure is not None:
            raise self._jobs.failure

    async def _keep_lead(self) -> None:
        while True:
            await self._leadership.renew()
            await asyncio.sleep(self._look_s)

    async def _look_after_store(self) -> None:
        """Keep the store as it should be; where others start workers, see who is there."""
        wrote_at = 0.0
        while True:
            if time.monotonic() - wrote_at > STORE_S:
                wrote_at = time.monotonic()
                await self._registry.try_sync()
            if not self._launcher.starts_workers:
                await self._look_at_registered()
            await asyncio.sleep(self._look_s)

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
            starting=self._jobs.named("start") - seen.keys(),
            num_experts_awaited=self._num_experts_awaited(now_s),
            resting=self._restarts.resting(now_s),
            starts_workers=self._launcher.starts_workers,
        )

    def _num_experts_awaited(self, now_s: float) -> int:
        if self._launcher.starts_workers or now_s - self._began_at > PODS_WAIT_S:
            return 0
        num_there = sum(member.record.role == "expert" for member in self._roster)
        return max(0, self._terms.demand.num_expert_workers - num_there)

    # ----------------------------------------------------------------------------------------------------------- acting

    async def _tick(self, now_s: float) -> None:
        for member in self._roster:
            if member.is_running and (member.is_suspect or member.silent_s > self._settings.lease_s):
                member.is_suspect = False
                self._jobs.once(("ask", member.record.worker_id), partial(self._ask_launcher, member))
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
        failures = self._restarts.failures()
        found = self._restarts.problem() or self._launcher_problem or self._roster.refusal()
        self._publish(observed, found or self._decision.problem, failures)

    def _act(self, action: Action) -> None:
        if isinstance(action, Start):
            self._jobs.once(("start", action.worker.id), partial(self._start, action.worker))
        elif isinstance(action, End):
            self._jobs.once(("end", action.record.worker_id), partial(self._end, action.record, kill=action.kill))
        elif isinstance(action, Forget):
            self._forget(action.record)
        elif isinstance(action, Send):
            self._roster.send(action.name, action.worker_id, action.message)

    async def _start(self, worker: PlacedWorker) -> None:
        assert self._plan.placement is not None
        topology = Topology(tuple(self._nodes.values()))
        launch = cluster_launch(self._settings, self._model, worker, self._plan.placement, topology, self._machine)
        logger.info("starting %s on %s", worker.id, worker.node_id)
        try:
            record = await self._launcher.start(worker, launch)
        except ForetokenError as error:
            logger.error("%s could not be started: %s", worker.id, error.message)
            self._restarts.note_failure(worker.id, time.monotonic(), error)
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

    def _publish(self, observed: Observed, problem: str | None, failures: tuple[StartFailure, ...]) -> None:
        """Say what the store should hold from now on."""
        self._registry.want_workers(self._roster.records)
        if (placement := self._encoded_placement()) is not None:
            self._registry.want_placement(placement)
        self._remember()
        lead, before = self._leadership.message, self._status
        status = cluster_status(
            self._settings.cluster_name, self._model.name, lead, self._terms, observed, self._plan, problem, failures
        )
        is_news = before is None or conditions(before) != conditions(status)
        if is_news or (before is not None and status.at_s - before.at_s > STATUS_S):
            is_starting = any(worker.condition == "starting" for worker in status.workers)
            if problem is not None and not is_starting and (before is None or before.problem != problem):
                logger.warning("%s", problem)
            self._status = status
            self._registry.want_status(status)
            self._jobs.once("sync", self._registry.try_sync)

    def _encoded_placement(self) -> bytes | None:
        """As it is kept, where it is ours to keep."""
        if self._plan.placement is None or not self._launcher.starts_workers:
            return None
        return encode_placement(self._plan.placement, self._nodes.values())

    # ---------------------------------------------------------------------------------------------------------- the end

    async def _end_workers(self) -> None:
        logger.info("stopping: ending the workers")
        await self._jobs.cancel("start")
        await end_in_order(self._roster, self._launcher, self._settings.drain_timeout_s)
        self._registry.want_workers({})
        if self._status is not None:
            self._registry.want_status(msgspec.structs.replace(self._status, workers=(), at_s=time.time()))
        await self._registry.try_sync()
        if self._last_known is not None:
            self._last_known.forget()

    async def _let_go(self) -> None:
        await self._jobs.cancel()
        await self._roster.close()
