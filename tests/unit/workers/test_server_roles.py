"""A worker in a cluster as its controller meets it: it announces itself, asks for a token, obeys, and ends in time."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cluster.protocol import CONTROL_METHOD, LINK_METHOD, SERVICE, STATE_METHOD, STREAM_METHOD, Assign
from tests.support.worker_process import DEADLINE_S, RunningWorker, bearer, control, tiny_checkpoint

TOKEN = "a token that nobody guesses"
ALL = (tuple(range(8)),) * 2
ORPHAN_S = 2.0  # a machine that has much else to do holds nobody up for so long


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def expert(checkpoint: Path, folder: Path, **options: object) -> RunningWorker:
    defaults: dict[str, object] = {
        "role": "expert",
        "address": "127.0.0.1:0",
        "announce_path": str(folder / "expert.json"),
        "exit_with_parent": False,
        "node_id": "node-1",
    }
    return RunningWorker(checkpoint, folder, "expert-0", **(defaults | options))


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """An expert worker with a token, for tests that leave it as it is."""
    with expert(checkpoint, tmp_path_factory.mktemp("guarded"), token=TOKEN) as worker:
        asyncio.run(worker.announced())
        yield worker


@pytest.mark.parametrize("method", [STREAM_METHOD, STATE_METHOD, CONTROL_METHOD, LINK_METHOD, f"/{SERVICE}/Other"])
@pytest.mark.parametrize("token", [None, "", "a guess", TOKEN + "x"])
def test_without_the_token_nothing_is_answered(guarded: RunningWorker, method: str, token: str | None) -> None:
    async def run() -> None:
        async with grpc.aio.insecure_channel(guarded.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(method)(b"\xc1", timeout=DEADLINE_S, metadata=bearer(token))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            silent = channel.stream_stream(method)(metadata=bearer(token))  # it is not even waited for a message
            assert await asyncio.wait_for(silent.code(), DEADLINE_S) == grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())


def test_with_the_token_it_is_controlled(guarded: RunningWorker) -> None:
    async def run() -> None:
        async with control(guarded.address, epoch=3, token=TOKEN) as leader:
            report = await leader.until(lambda report: report.epoch == 3)
            assert report.name == "expert-0"
            assert report.worker_id == report.state.worker_id
            async with control(guarded.address, epoch=2, token=TOKEN) as late:
                assert (await late.last()).epoch == 3

    asyncio.run(run())


def test_it_announces_itself_and_takes_what_it_is_assigned(checkpoint: Path, tmp_path: Path) -> None:
    async def run() -> None:
        with expert(checkpoint, tmp_path, drain_timeout_s=60) as worker:
            announcement = await worker.announced()
            path = tmp_path / "expert.json"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert list(tmp_path.iterdir()) == [path]  # the temporary file is gone
            assert announcement.pid == worker.process.pid
            assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", announcement.address)
            worker.close_stdin()
            worker.process.send_signal(signal.SIGHUP)
            async with control(worker.address) as leader:
                report = await leader.until(lambda report: report.epoch == 1)
                assert report.worker_id == announcement.worker_id
                assert report.experts == ((), ())
                await leader.send(Assign(version=1, experts=((0, 9), ())))
                assert (await leader.until(lambda report: report.error is not None)).assign_version == 0
                for version, experts in ((2, ((1,), (0, 3))), (3, ALL), (4, ((), ()))):
                    await leader.send(Assign(version=version, experts=experts))
                    report = await leader.until(lambda report, version=version: report.assign_version == version)
                    assert (report.experts, report.error) == (experts, None)
                worker.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(worker.process.wait, DEADLINE_S / 2) == 0  # no link: nothing to wait for

    asyncio.run(run())


@pytest.mark.parametrize("role", ["expert", "attention"])
def test_an_orphan_ends_itself_and_says_why(checkpoint: Path, tmp_path: Path, role: str) -> None:
    async def run() -> None:
        with expert(checkpoint, tmp_path, role=role, orphan_timeout_s=ORPHAN_S) as worker:
            await worker.announced()
            async with control(worker.address) as leader:
                began = time.monotonic()
                while time.monotonic() - began < 1.5 * ORPHAN_S:  # longer than it lives alone
                    await leader.lead()
                    assert await leader.read() is not None, "it ended while it was led"
                # The stream stays open and reports are read: only a Lead is a sign of life.
                with pytest.raises((AssertionError, grpc.aio.AioRpcError)):
                    await leader.until(lambda _: False)
            assert await asyncio.to_thread(worker.process.wait, DEADLINE_S) == 1
            assert f"{ORPHAN_S:g} s (orphan_timeout_s)" in worker.end()

    asyncio.run(run())


def test_a_worker_that_nobody_ever_led_ends_as_well(checkpoint: Path, tmp_path: Path) -> None:
    with expert(checkpoint, tmp_path, orphan_timeout_s=0.2) as worker:
        assert worker.process.wait(DEADLINE_S) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"announce_path": "/nowhere/at/all.json"}, "cannot write /nowhere/at/all.json"),
        ({"address": "203.0.113.7:1"}, "cannot listen on 203.0.113.7:1"),
        ({"tensor_host": "203.0.113.7"}, "tensor_host '203.0.113.7'"),
        ({"model_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    checkpoint: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with expert(checkpoint, tmp_path, **options) as worker:
        assert worker.process.wait(DEADLINE_S) == 2
        errors = worker.end()
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []
