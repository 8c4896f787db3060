"""A worker that does not answer is killed; one that answers late, or was started anew, is not. So is a still loop."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cluster.operate import pulse
from cluster.operate.children import Child
from cluster.operate.pulse import Pulse, end_without_beat, watch_pulse
from tests.support.eventually import eventually

PATIENCE_S = 0.4
BOUND_S = 10.0
CHILD_BOUND_S = 60.0
# It beats, until a line tells it to stand still.
BEATING = """
import pathlib, sys, time
from cluster.operate.pulse import Pulse
pulse, still = Pulse(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])
while not still.exists():
    pulse.beat()
    time.sleep(0.05)
still.unlink()
time.sleep(600)
"""


async def _watch_until(
    is_over: asyncio.Event, pid: Callable[[], int | None], ask: Callable[[], Awaitable[bool]], kill: Callable[[], None]
) -> None:
    watching = asyncio.create_task(watch_pulse(pid, ask, kill, PATIENCE_S))
    try:
        async with asyncio.timeout(BOUND_S):
            await is_over.wait()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize("answer", ["no", "never", "cancelled"])
def test_a_silent_worker_is_killed_after_the_patience(answer: str) -> None:
    async def run() -> float:
        loop, killed = asyncio.get_running_loop(), asyncio.Event()

        async def ask() -> bool:
            if answer == "cancelled":  # as grpc may do by itself
                raise asyncio.CancelledError
            await asyncio.sleep(0.01 if answer == "no" else 3600.0)
            return False

        started = loop.time()
        await _watch_until(killed, lambda: 1, ask, killed.set)
        return loop.time() - started

    assert PATIENCE_S <= asyncio.run(run()) < BOUND_S


def test_an_answer_that_takes_most_of_the_patience_is_an_answer() -> None:
    async def run() -> int:
        answered, num_answers, num_kills = asyncio.Event(), 0, 0

        async def ask() -> bool:
            nonlocal num_answers
            await asyncio.sleep(PATIENCE_S / 2)
            num_answers += 1
            if num_answers == 4:
                answered.set()
            return True

        def kill() -> None:
            nonlocal num_kills
            num_kills += 1

        await _watch_until(answered, lambda: 1, ask, kill)
        return num_kills

    assert asyncio.run(run()) == 0


def test_silence_counts_for_one_process_only() -> None:
    async def run() -> tuple[list[int], int]:
        killed, asked = asyncio.Event(), []
        pids = iter([7] * 10 + [8] * 10_000)  # the first ends by itself, before the patience is over
        now = 7

        def pid() -> int:
            nonlocal now
            now = next(pids)
            return now

        async def ask() -> bool:
            asked.append(now)
            await asyncio.sleep(3600.0)
            return True

        await _watch_until(killed, pid, ask, killed.set)
        return asked, now

    asked, killed_pid = asyncio.run(run())
    assert asked == [7, 8]
    assert killed_pid == 8


def test_a_worker_that_is_not_ready_is_not_asked() -> None:
    async def run() -> int:
        num_asked = 0
        looked, num_looks = asyncio.Event(), 0

        def pid() -> None:
            nonlocal num_looks
            num_looks += 1
            if num_looks == 60:  # for longer than the patience
                looked.set()

        async def ask() -> bool:
            nonlocal num_asked
            num_asked += 1
            return True

        await _watch_until(looked, pid, ask, lambda: pytest.fail("nobody is there to be killed"))
        return num_asked

    assert asyncio.run(run()) == 0


def test_a_beat_is_the_files_time_and_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_S", 0.0)
    path = tmp_path / "pulse"
    beating = Pulse(path)
    for _ in range(2):  # also after it was taken away
        beating.beat()
        beating.beat()
        assert path.read_text() == str(os.getpid())
        os.utime(path, (1.0, 1.0))
        beating.beat()
        assert path.stat().st_mtime > 1.0
        path.unlink()
        beating.beat()
    Pulse(None).beat()


def test_beats_are_few(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    beating = Pulse(path)
    beating.beat()
    os.utime(path, (1.0, 1.0))
    beating.beat()
    assert path.stat().st_mtime == 1.0


def test_a_pulse_that_cannot_be_written_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    beating = Pulse(tmp_path / "none" / "pulse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pulse, "BEAT_S", 0.0)
        for _ in range(3):
            beating.beat()
    assert len(caplog.records) == 1


def test_it_beats_during_a_step_with_a_deadline_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_S", 0.01)
    path = tmp_path / "pulse"

    async def run() -> int:
        async def step() -> int:
            for _ in range(3):
                while not path.exists():
                    await asyncio.sleep(0.001)
                path.unlink()
            return 7

        async def fails() -> int:
            raise KeyError("it fails")

        with pytest.raises(KeyError):
            await Pulse(path).during(fails())
        return await Pulse(path).during(step())

    assert asyncio.run(asyncio.wait_for(run(), BOUND_S)) == 7


@pytest.fixture
def child(tmp_path: Path) -> Child:
    command = (sys.executable, "-c", BEATING, str(tmp_path / "pulse"), str(tmp_path / "still"))
    return Child("it", command, os.environ, tmp_path / "it.log")


@pytest.mark.needs("linux")
def test_a_process_whose_loop_stands_still_is_killed_and_started_anew(child: Child, tmp_path: Path) -> None:
    path = tmp_path / "pulse"

    async def run() -> None:
        child.start()
        tasks = [asyncio.create_task(child.keep_up()), asyncio.create_task(end_without_beat(child, path, 3.0))]
        first = child.pid
        await eventually(path.exists)
        began = time.monotonic()
        before = path.stat().st_mtime_ns
        await eventually(lambda: path.stat().st_mtime_ns != before)
        (tmp_path / "still").touch()
        await eventually(lambda: child.pid not in (None, first))
        assert time.monotonic() - began > 2.0
        second = child.pid
        await eventually(lambda: path.read_text() == str(second))
        await child.stop()
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert child.pid is None

    asyncio.run(run())


@pytest.mark.needs("linux")
@pytest.mark.parametrize("begins", [True, False], ids=["is-to-end", "has-not-begun"])
def test_one_that_is_to_end_or_has_yet_to_begin_is_left_alone(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    looks = 0

    class _Path(type(tmp_path)):  # type: ignore[misc]
        def read_text(self, *arguments: object, **named: object) -> str:
            nonlocal looks
            looks += 1
            return str(super().read_text(*arguments, **named))

    killed = []
    monkeypatch.setattr(Child, "kill", lambda self: killed.append(self.pid))
    path = _Path(tmp_path / "pulse")
    path.write_text("1")  # another process's

    async def run() -> None:
        child.start()
        if begins:
            child.give_up()
        watching = asyncio.create_task(end_without_beat(child, path, PATIENCE_S))
        began = time.monotonic()
        await eventually(lambda: looks > 2 * pulse.LOOKS or (begins and time.monotonic() - began > 2 * PATIENCE_S))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await child.stop()

    (tmp_path / "still").touch()
    asyncio.run(run())
    assert killed == []
    assert (looks == 0) == begins


@pytest.mark.needs("linux")
def test_one_that_never_begins_is_killed(child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEGIN_S", PATIENCE_S)
    (tmp_path / "still").touch()

    async def run() -> None:
        child.start()
        watching = asyncio.create_task(end_without_beat(child, tmp_path / "pulse", PATIENCE_S))
        await eventually(lambda: child.pid is None)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await child.stop()

    asyncio.run(run())
