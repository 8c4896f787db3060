"""A stream as a person watches it: its text as it comes, the moment of a kill, and how long nothing came after that."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from rich.console import Console

from cluster.protocol import Role
from cluster.store.records import ClusterStatus, WorkerStatus
from loadtests.cluster_process import LocalCluster
from loadtests.token_streams import TokenStream, read_stream

STREAM_S = 120.0  # its pauses included
KILL_AFTER = 30  # tokens
STILL_S = 0.07  # so long without text is told
FRAME_S = 0.02
SHOWN_EXPERTS = 8


@dataclass(frozen=True)
class Killed:
    """A worker that was killed."""

    name: str
    pid: int
    about: str
    at_s: float  # time.monotonic()


def watch(
    console: Console, cluster: LocalCluster, body: dict[str, Any], role: Role | None = None
) -> tuple[TokenStream, Killed | None]:
    """Stream a chat and show it; with a `role`, SIGKILL a worker of that role in mid-stream.

    None in its place where there was nobody to kill before the stream was over.
    """
    return asyncio.run(_watch(console, cluster, body, role))


async def _watch(
    console: Console, cluster: LocalCluster, body: dict[str, Any], role: Role | None
) -> tuple[TokenStream, Killed | None]:
    stream = TokenStream()
    url = f"{cluster.server.base_url}/v1/chat/completions"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        reading = asyncio.create_task(read_stream(session, url, body, stream, STREAM_S))
        striking = asyncio.create_task(_strike(cluster, role, stream, reading))
        try:
            await _show(console, stream, reading, striking)
            return stream, await striking
        finally:
            reading.cancel()
            striking.cancel()
            await asyncio.gather(reading, striking, return_exceptions=True)


async def _strike(
    cluster: LocalCluster, role: Role | None, stream: TokenStream, reading: asyncio.Task[None]
) -> Killed | None:
    """Once `KILL_AFTER` tokens have come, kill who is known to work on them."""
    began_s = time.time()
    while role is not None and not reading.done():
        if len(stream.ids) >= KILL_AFTER:
            status = await asyncio.to_thread(cluster.status)
            worker = None if status is None else victim(status, role, began_s)
            if status is not None and worker is not None and not reading.done():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
                    return Killed(worker.name, worker.pid, about(worker, status), time.monotonic())
        await asyncio.sleep(FRAME_S)
    return None


def victim(status: ClusterStatus, role: Role, since_s: float) -> WorkerStatus | None:
    """The expert worker that holds most, or the attention worker that runs what began at `since_s` (`time.time()`)."""
    serving = [worker for worker in status.workers if worker.role == role and worker.condition == "serving"]
    if role == "expert":
        return max(serving, key=lambda worker: worker.num_experts, default=None)
    busy = [worker for worker in serving if worker.state.num_running > 0]
    return busy[0] if busy and status.at_s > since_s else None


def about(worker: WorkerStatus, status: ClusterStatus) -> str:
    """What a worker is there for."""
    if worker.role != "expert":
        return "which runs this chat"
    total = status.num_experts * status.num_layers
    first = _some(worker.shards[0]) if worker.shards else "none"
    return f"which holds {worker.num_experts} of {total} experts, in the first layer {first}"


def _some(experts: Sequence[int]) -> str:
    shown = ", ".join(map(str, experts[:SHOWN_EXPERTS]))
    more = len(experts) - SHOWN_EXPERTS
    return f"{shown} and {more} more" if more > 0 else shown or "none"


async def _show(
    console: Console, stream: TokenStream, reading: asyncio.Task[None], striking: asyncio.Task[Killed | None]
) -> None:
    """Until the stream is over."""
    num_shown, last_s = 0, time.monotonic()
    is_struck = is_still = False
    is_line_start = True

    def put(text: str, style: str) -> None:
        nonlocal is_line_start
        console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        is_line_start = text.endswith("\n")

    def remark(text: str, style: str) -> None:
        put(text if is_line_start else f"\n{text}", style)

    while True:
        is_over = reading.done()
        if not is_struck and striking.done() and not striking.cancelled() and (killed := striking.result()):
            is_struck = True
            remark(f"   SIGKILL to process {killed.pid}: {killed.name}, {killed.about}\n", "bold red")
        text, now = stream.text[num_shown:], time.monotonic()
        if text:
            if is_still:
                is_still = False
                put(f" goes on after {now - last_s:.2f} s]\n", "bold yellow")
            put(text, "green" if is_struck else "cyan")
            num_shown += len(text)
            last_s = now
        elif is_struck and not is_still and not is_over and now > last_s + STILL_S:
            is_still = True
            remark("   [the text stops ...", "bold yellow")
        if is_over:
            remark("", "")
            return
        await asyncio.sleep(FRAME_S)
