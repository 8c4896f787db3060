"""Whether a process hangs, from outside: one that serves answers a question, a loop that decides beats on a file.

A worker's event loop answers whatever its engine does, and a load beside it. A file's beat is given by the loop itself,
where it goes round: an event loop that runs on beside it does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio

from cluster.channel import CHANNEL_OPTIONS, call_metadata
from cluster.control.worker_process import WorkerProcess
from cluster.operate.children import Child
from cluster.protocol import STATE_METHOD
from cluster.silence import ListeningTime

logger = logging.getLogger(__name__)

LOOKS = 20  # at the process within `patience_s`
BEAT_S = 0.5  # between two beats
BEGIN_S = 60.0  # until a process's first answer or beat

T = TypeVar("T")


class Pulse:
    """A file that has this process's id, and was written when it beat last."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: nobody looks."""
        self._path = path
        self._beaten_at: float | None = None
        self._has_begun = False
        self._has_told = False

    def beat(self) -> None:
        now = time.monotonic()
        if self._path is None or (self._beaten_at is not None and now - self._beaten_at < BEAT_S):
            return
        self._beaten_at = now
        try:
            if self._has_begun:
                os.utime(self._path)
            else:
                self._path.write_text(str(os.getpid()), encoding="ascii")
                self._has_begun = True
        except OSError as error:
            self._has_begun = False  # somebody may have taken it away
            if not self._has_told:
                logger.warning("%s cannot be written, and so a hang not be noticed: %s", self._path, error)
            self._has_told = True

    async def during(self, work: Awaitable[T]) -> T:
        """The result of `work`, which has deadlines of its own: there is a beat while it is waited for."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self.beat()
                await asyncio.wait({task}, timeout=BEAT_S)
        finally:
            task.cancel()
        return await task


async def end_hung(worker: WorkerProcess, token: str | None, patience_s: float) -> None:
    """Kill the worker's process whenever it does not answer for `patience_s` after its start; `watch` starts it anew.

    Runs until cancelled.
    """
    metadata = call_metadata(token)

    async def ask() -> bool:
        try:
            async with grpc.aio.insecure_channel(worker.launch.address, options=CHANNEL_OPTIONS) as channel:
                await channel.unary_unary(STATE_METHOD)(b"", timeout=patience_s, metadata=metadata)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return False
        return True

    def kill() -> None:
        logger.error(
            "the worker, process %d, has not answered for %g s: it hangs, and is killed", worker.pid, patience_s
        )
        worker.kill()

    await watch_pulse(lambda: worker.pid if worker.is_ready else None, ask, kill, patience_s)


async def end_without_beat(child: Child, path: Path, patience_s: float) -> None:
    """`end_silent` by the `Pulse` at `path`."""
    seen: tuple[str, int] | None = None

    async def has_beaten(pid: int) -> bool:
        nonlocal seen
        try:
            now = (path.read_text(encoding="ascii"), path.stat().st_mtime_ns)
        except (OSError, ValueError):
            return False
        if now[0] != str(pid):  # its predecessor's
            return False
        before, seen = seen, now
        return now != before

    await end_silent(child, has_beaten, patience_s)


async def end_unanswering(child: Child, is_answering: Callable[[float], Awaitable[bool]], patience_s: float) -> None:
    """`end_silent` by a question that is given so many seconds."""
    await end_silent(child, lambda _: is_answering(patience_s), patience_s)


async def end_silent(child: Child, ask: Callable[[int], Awaitable[bool]], patience_s: float) -> None:
    """Kill the process of `child` whenever it was silent for `patience_s`; `keep_up` starts it anew.

    `ask` gets its process id and says whether it answered, and may take its time over it. The process may take
    `BEGIN_S` until its first answer. Runs until cancelled; a child that is to end is left alone.
    """
    clock = time.monotonic
    process, since_s, has_begun = 0, 0.0, False

    def pid() -> int | None:
        nonlocal process, since_s, has_begun
        found = None if child.is_given_up else child.pid
        if found is not None and found != process:
            process, since_s, has_begun = found, clock(), False
        return found

    async def answers() -> bool:
        nonlocal has_begun
        if has_begun:
            return await ask(process)
        with contextlib.suppress(TimeoutError):  # what is yet to begin may leave a question lying
            async with asyncio.timeout(patience_s / 2):
                has_begun = await ask(process)
        return has_begun or clock() - since_s < BEGIN_S

    def kill() -> None:
        logger.error(
            "%s, process %s, has not gone on for %g s: it hangs, and is killed", child.name, child.pid, patience_s
        )
        child.kill()

    await watch_pulse(pid, answers, kill, patience_s)


async def watch_pulse(
    pid: Callable[[], int | None], ask: Callable[[], Awaitable[bool]], kill: Callable[[], None], patience_s: float
) -> None:
    """`ask` the process that `pid` names, again and again, and `kill` it once it was silent for `patience_s`.

    A question may take all that time: an answer that comes late is one.
    """
    pause_s = patience_s / LOOKS
    listening = ListeningTime(pause_s, asyncio.get_running_loop().time)
    asked: int | None = None
    silent_s = 0.0
    answer: asyncio.Future[bool] | None = None
    try:
        while True:
            if (now := pid()) != asked and answer is not None:
                answer.cancel()
                answer = None
            if now != asked:
                asked, silent_s = now, 0.0
            if asked is not None and answer is None:
                answer = asyncio.ensure_future(ask())
            await asyncio.sleep(pause_s)
            silent_s += listening.passed_s()
            if answer is not None and answer.done():
                if not answer.cancelled() and answer.result():  # grpc may cancel a call by itself: that is no answer
                    silent_s = 0.0
                answer = None
            if asked is not None and asked == pid() and silent_s >= patience_s:
                kill()
                silent_s = 0.0
    finally:
        if answer is not None:
            answer.cancel()
