"""Whom a worker obeys, and what it reports."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import msgspec
import pytest

from cluster.errors import CheckpointError
from cluster.protocol import SERVICE, Assign, Lead, Route, WorkerReport
from tests.support.worker_process import DEADLINE_S, ControlStream, control
from workers.control import ControlService
from workers.lease import Lease


@dataclass
class FakeSubject:
    """Holds what it was told last; an order waits for the gate, and fails where `failure` says why."""

    orders: list[int] = field(default_factory=list)
    version: int = 0
    failure: Exception | None = None
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def carry_out(self, order: Assign | Route) -> None:
        self.orders.append(order.version)
        assert self.gate.wait(DEADLINE_S)
        if self.failure is not None:
            raise self.failure
        self.version = order.version

    def forget_versions(self) -> None:
        self.version = 0

    def reported(self, report: WorkerReport) -> WorkerReport:
        return msgspec.structs.replace(report, assign_version=self.version)


class CountingLease(Lease):
    def __init__(self) -> None:
        super().__init__(None, "")
        self.renewals = 0

    def renew(self) -> None:
        self.renewals += 1


@dataclass
class Served:
    """A control service behind a real server in this process."""

    address: str
    subject: FakeSubject
    lease: CountingLease
    service: ControlService


@contextlib.asynccontextmanager
async def serving(heartbeat_s: float = DEADLINE_S) -> AsyncIterator[Served]:
    """The heartbeat is longer than any wait here: what comes, comes because something changed."""
    subject, lease = FakeSubject(), CountingLease()
    base = WorkerReport(worker_id="w", name="expert-0", epoch=0)
    service = ControlService(subject, lease, report=lambda: base, heartbeat_s=heartbeat_s)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, service.handlers()),))
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/c.sock"
        server.add_insecure_port(address)
        await server.start()
        try:
            yield Served(address, subject, lease, service)
        finally:
            subject.gate.set()
            await server.stop(None)


def assign(version: int) -> Assign:
    return Assign(version=version, experts=((0, 1),))


def test_reports_come_with_the_heartbeat_and_orders_are_acknowledged() -> None:
    async def run() -> None:
        async with serving(heartbeat_s=0.01) as served, control(served.address, epoch=3) as leader:
            for _ in range(3):
                report = await leader.read()
                assert report is not None
                assert (report.epoch, report.name, report.assign_version) == (3, "expert-0", 0)
            await leader.send(assign(5))
            assert (await leader.until(lambda report: report.assign_version == 5)).error is None

    asyncio.run(run())


def test_a_change_is_reported_at_once() -> None:
    async def run() -> None:
        async with serving() as served, control(served.address) as leader:
            await leader.read()
            await leader.send(assign(1))
            await leader.until(lambda report: report.assign_version == 1)
            served.subject.version = 7
            threading.Thread(target=served.service.notify).start()
            await leader.until(lambda report: report.assign_version == 7)

    asyncio.run(run())


def test_a_stream_begins_with_lead() -> None:
    async def run() -> None:
        async with serving() as served, grpc.aio.insecure_channel(served.address) as channel:
            for message in (assign(1), {"type": "nothing of ours"}):
                stranger = ControlStream(channel)
                await stranger.send(message)
                assert await stranger.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert served.subject.orders == []
            assert served.lease.renewals == 0

    asyncio.run(run())


def test_a_lower_epoch_is_told_the_higher_one_and_changes_nothing() -> None:
    async def run() -> None:
        async with serving() as served, control(served.address, epoch=4, controller_id="new") as leader:
            await leader.read()
            renewals = served.lease.renewals
            async with control(served.address, epoch=3, controller_id="old") as late:
                assert (await late.last()).epoch == 4
            assert served.lease.renewals == renewals
            await leader.send(assign(1))
            await leader.until(lambda report: report.assign_version == 1)

    asyncio.run(run())


def test_an_epoch_has_one_controller() -> None:
    async def run() -> None:
        async with serving() as served, control(served.address, epoch=4, controller_id="one") as leader:
            await leader.read()
            async with control(served.address, epoch=4, controller_id="two") as other:
                assert (await other.last()).epoch == 4
            await leader.send(assign(1))
            await leader.until(lambda report: report.assign_version == 1)

    asyncio.run(run())


def test_a_higher_epoch_takes_over_and_what_the_old_controller_ordered_is_dropped() -> None:
    async def run() -> None:
        async with serving(heartbeat_s=0.01) as served, control(served.address, epoch=1, controller_id="old") as old:
            served.subject.gate.clear()
            await old.send(assign(8))
            await old.until(lambda _: served.subject.orders == [8])
            await old.send(assign(9))
            await old.lead()
            await old.until(lambda _: served.lease.renewals == 2)  # 9 waits
            async with control(served.address, epoch=2, controller_id="new") as new:
                report = await new.read()
                assert report is not None
                assert report.epoch == 2
                assert (await old.last()).epoch == 2
                served.subject.gate.set()
                await new.send(assign(1))
                await new.until(lambda report: report.assign_version == 1)
                assert served.subject.orders == [8, 1]

    asyncio.run(run())


def test_the_same_controller_comes_again_and_goes_on() -> None:
    async def run() -> None:
        async with serving() as served, control(served.address) as first:
            await first.send(assign(3))
            await first.until(lambda report: report.assign_version == 3)
            async with control(served.address) as second:
                report = await second.read()
                assert report is not None
                assert report.assign_version == 3
                await first.last()
                await second.send(assign(4))
                await second.until(lambda report: report.assign_version == 4)

    asyncio.run(run())


def test_a_controller_may_raise_its_epoch_and_goes_on() -> None:
    async def run() -> None:
        async with serving() as served, control(served.address, epoch=2) as leader:
            await leader.send(assign(3))
            await leader.until(lambda report: report.assign_version == 3)
            await leader.send(Lead(epoch=7, controller_id="a"))
            await leader.send(assign(4))
            report = await leader.until(lambda report: report.assign_version == 4)
            assert report.epoch == 7
            async with control(served.address, epoch=7) as again:
                report = await again.read()
                assert report is not None
                assert report.assign_version == 4
                await again.send(Lead(epoch=6, controller_id="a"))  # its own past
                assert (await again.last()).epoch == 7

    asyncio.run(run())


def test_of_the_orders_that_wait_the_newest_wins() -> None:
    async def run() -> None:
        async with serving(heartbeat_s=0.01) as served, control(served.address) as leader:
            served.subject.gate.clear()
            await leader.send(assign(1))
            while served.subject.orders != [1]:
                await leader.read()  # it reports while it works
            renewals = served.lease.renewals
            for version in (2, 3, 4):
                await leader.send(assign(version))
            await leader.lead()  # comes after the three
            await leader.until(lambda _: served.lease.renewals > renewals)
            served.subject.gate.set()
            await leader.until(lambda report: report.assign_version == 4)
            assert served.subject.orders == [1, 4]

    asyncio.run(run())


def test_why_an_order_failed_is_reported_until_one_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving() as served, control(served.address) as leader:
            for failure, text in ((CheckpointError("no such file"), "no such file"), (KeyError("x"), "KeyError: 'x'")):
                served.subject.failure = failure
                await leader.send(assign(1))
                report = await leader.until(lambda report, text=text: report.error == text)
                assert report.assign_version == 0
            served.subject.failure = None
            served.subject.gate.clear()
            await leader.send(assign(2))
            await leader.until(lambda report: report.error is None)  # it may succeed
            served.subject.gate.set()
            assert (await leader.until(lambda report: report.assign_version == 2)).error is None

    asyncio.run(run())
    assert "Assign 1 was not carried out" in caplog.text


def test_each_lead_renews_the_lease() -> None:
    async def run() -> None:
        async with serving(heartbeat_s=0.01) as served, control(served.address) as leader:
            await leader.lead()
            await leader.until(lambda _: served.lease.renewals == 2)

    asyncio.run(run())


def test_a_message_of_another_protocol_ends_its_stream_alone() -> None:
    async def run() -> None:
        async with serving() as served:
            async with control(served.address) as leader:
                await leader.read()
                await leader.send({"type": "nothing of ours"})
                await leader.last()
            async with control(served.address) as leader:
                await leader.send(assign(1))
                await leader.until(lambda report: report.assign_version == 1)

    asyncio.run(run())
