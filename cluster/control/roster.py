"""The workers that a controller knows of: a control stream to each, its last report, and how long ago that was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from cluster.control.control_client import ControlClient
from cluster.control.plan import Seen
from cluster.protocol import Assign, EngineState, Lead, Route, WorkerReport
from cluster.store.records import WorkerRecord


@dataclass
class Member:
    """A worker that was started and is not known to have ended."""

    record: WorkerRecord
    client: ControlClient
    is_adopted: bool
    since_s: float
    report: WorkerReport | None = None
    num_reports: int = 0
    silent_s: float = 0.0
    is_running: bool = True
    is_suspect: bool = False  # its stream broke: whether its process is still there must be asked

    @property
    def is_led(self) -> bool:
        """It goes on reporting: the first report of one that obeys another controller is its last word."""
        return self.num_reports > 1

    @property
    def seen(self) -> Seen:
        return Seen(self.record, self.report, self.silent_s, self.is_running, self.is_adopted)


class Roster:
    """By name, one process each."""

    def __init__(
        self,
        *,
        token: str | None,
        lead: Callable[[], Lead],
        heartbeat_s: float,
        lease_s: float,
        on_news: Callable[[], None],
        on_refused: Callable[[WorkerReport], None],
    ) -> None:
        """`on_news`: a report changed or a stream broke. `on_refused`: a worker obeys another controller."""
        self._token = token
        self._lead = lead
        self._heartbeat_s = heartbeat_s
        self._lease_s = lease_s
        self._on_news = on_news
        self._on_refused = on_refused
        self._members: dict[str, Member] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def get(self, record: WorkerRecord) -> Member | None:
        """The process of that record; None where it is not known, or another has its name."""
        member = self._members.get(record.name)
        return member if member is not None and member.record.worker_id == record.worker_id else None

    @property
    def records(self) -> dict[str, WorkerRecord]:
        return {name: member.record for name, member in sorted(self._members.items())}

    @property
    def seen(self) -> dict[str, Seen]:
        return {name: member.seen for name, member in sorted(self._members.items())}

    def refusal(self) -> str | None:
        """Why a worker does not let itself be led: another token, or another release."""
        found = [(name, member.client.refusal) for name, member in sorted(self._members.items())]
        return next((text if name in text else f"{name}: {text}" for name, text in found if text), None)

    def add(self, record: WorkerRecord, *, is_adopted: bool) -> None:
        """Lead this worker from now on, in the place of one that had its name."""
        if (before := self._members.get(record.name)) is not None:
            self.remove(before)

        def on_broken() -> None:
            member.is_suspect = True
            self._on_news()

        client = ControlClient(
            record.address,
            token=self._token,
            lead=self._lead,
            heartbeat_s=self._heartbeat_s,
            answer_timeout_s=self._lease_s,
            on_report=lambda report: self._take(member, report),
            on_refused=self._on_refused,
            on_broken=on_broken,
        )
        member = Member(record, client, is_adopted, time.monotonic())
        self._members[record.name] = member
        client.start()

    def remove(self, member: Member) -> None:
        if self._members.get(member.record.name) is member:
            del self._members[member.record.name]
        task = asyncio.get_running_loop().create_task(member.client.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def drop(self, worker_id: str) -> None:
        """Leave the worker of that id."""
        for member in self:
            if member.record.worker_id == worker_id:
                self.remove(member)

    def send(self, name: str, worker_id: str, order: Assign | Route) -> None:
        member = self._members.get(name)
        if member is not None and member.record.worker_id == worker_id:
            member.client.send(order)

    def age(self, elapsed_s: float) -> None:
        for member in self._members.values():
            member.silent_s += elapsed_s

    async def close(self) -> None:
        """Leave all workers; they go on."""
        for member in self:
            self.remove(member)
        if self._closing:
            await asyncio.wait(self._closing)

    def _take(self, member: Member, report: WorkerReport) -> None:
        if report.worker_id != member.record.worker_id:
            return  # another process got its address
        before, member.report, member.silent_s = member.report, report, 0.0
        member.num_reports += 1
        if report.epoch > self._lead().epoch:
            self._on_refused(report)
        if before is None or _without_state(before) != _without_state(report):
            self._on_news()


def _without_state(report: WorkerReport) -> WorkerReport:
    return msgspec.structs.replace(report, state=EngineState())
