"""A worker as a child of this process: started, watched, restarted and ended.

It gets its `Launch` as one JSON line on its standard input, which then stays open: its end tells the worker that its
parent is gone. What it prints is passed on to our standard error, and the last of it is kept for the error message
should it die. Its last word on why it cannot start becomes the error itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from cluster.config import Settings
from cluster.control.failures import Failures, backoff_s
from cluster.control.last_words import LAST_WORD, TAIL_BYTES, last_lines, refusal
from cluster.control.launch import COMMAND, POLL_S, launch_message, worker_environment
from cluster.errors import DeadlineError, WorkerLostError
from cluster.machine import this_machine
from cluster.protocol import Launch

logger = logging.getLogger(__name__)


class WorkerProcess:
    """One worker and, after a death, its successor on the same address.

    `start` returns when its socket answers. `watch` then restarts it each time it dies, until `stop`; it raises
    `WorkerLostError` when three starts in a row fail in the same way.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        environment: Mapping[str, str],
        start_timeout_s: float,
        command: Sequence[str] = COMMAND,
        backoff: Callable[[int], float] = backoff_s,
        output: BinaryIO | None = None,
    ) -> None:
        """`output` takes what the worker prints; None: our standard error."""
        self.launch = launch
        self.num_starts = 0
        self._command = tuple(command)
        self._environment = dict(environment)
        self._start_timeout_s = start_timeout_s
        self._backoff = backoff
        self._output = sys.stderr.buffer if output is None else output
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._tail = bytearray()
        self._is_ready = False
        self._stopping = asyncio.Event()
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The running process's id; None between two."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    @property
    def is_ready(self) -> bool:
        """The process that was started last has answered."""
        return self._is_ready

    @property
    def last_lines(self) -> str:
        """The end of what the worker printed."""
        return last_lines(self._tail)

    async def start(self) -> None:
        """Start the process and wait until it answers.

        Raises `StartRefusedError` with its own `error:` line when it ends before that, or without one `WorkerLostError`
        with its exit code and last lines, as it does when `stop` comes meanwhile; `DeadlineError` when it takes
        longer than the start timeout. No process is left behind.
        """
        async with self._starting:
            await self._start()

    async def _start(self) -> None:
        if self._stopping.is_set():
            raise WorkerLostError("the worker is being stopped")
        if self.launch.address.startswith("unix:"):
            Path(self.launch.address.removeprefix("unix:")).unlink(missing_ok=True)  # a dead worker's
        self._tail.clear()
        self._is_ready = False
        self.num_starts += 1
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is ours to handle: it must not reach the worker as well
        )
        self._pump = asyncio.create_task(self._pass_on(self._process))
        try:
            assert self._process.stdin is not None
            with contextlib.suppress(ConnectionError):  # it ended at once; `_wait_ready` tells why
                self._process.stdin.write(msgspec.json.encode(self.launch) + b"\n")
                await self._process.stdin.drain()
            await self._wait_ready(self._process)
            self._is_ready = True
        except BaseException:
            self.kill()
            await self._reap()
            raise

    async def watch(self) -> None:
        """Restart the worker whenever it dies; returns after `stop`, raises when it cannot be started any more."""
        failures = Failures(self._backoff)
        while not self._stopping.is_set():
            assert self._process is not None
            started = time.monotonic()
            await self._reap()
            if self._stopping.is_set():
                return
            failures.note_death(time.monotonic() - started)
            logger.error("the worker %s; starting it again", _exit_words(self._process.returncode))
            while not await self._stopped_within(failures.pause_s):
                try:
                    await self.start()
                    failures.note_start()
                    break
                except (WorkerLostError, DeadlineError) as error:
                    if self._stopping.is_set():
                        return
                    failures.note_failed_start(error)
                    if failures.is_hopeless:
                        num = failures.num_alike
                        why = f"gave up after {num} equal failures: " if num > 1 else ""
                        raise WorkerLostError(f"{why}{error.message}") from error
                    logger.error("%s", error.message)

    async def stop(self, timeout_s: float) -> None:
        """Ask the worker to end (SIGTERM), and end it (SIGKILL) after `timeout_s`. Idempotent."""
        self._stopping.set()
        async with self._starting:  # a start that was under way gives up first
            if self._process is None:
                return
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                logger.warning("the worker did not end within %.1f s and was killed", timeout_s)
                self.kill()
            await self._reap()

    def kill(self) -> None:
        """End the process at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _reap(self) -> None:
        """Wait until the process has ended, and until what it printed is passed on."""
        assert self._process is not None
        await self._process.wait()
        if self._pump is not None:
            await asyncio.wait([self._pump], timeout=1.0)  # a grandchild may hold the pipe open
            self._pump.cancel()
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _pass_on(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while chunk := await process.stdout.read(TAIL_BYTES):
            self._tail.extend(chunk)
            # Once it serves, such a line is like any other: what follows it may be a traceback.
            said = None if self._is_ready else LAST_WORD.search(self._tail)
            shown = self._tail[len(self._tail) - len(chunk) : said.start() if said else None]
            del self._tail[:-TAIL_BYTES]
            with contextlib.suppress(OSError, ValueError):  # our own standard error may be gone
                self._output.write(shown)
                self._output.flush()

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not await _answers(self.launch.address):
            if process.returncode is not None:
                await self._reap()
                raise refusal(self._tail) or WorkerLostError(
                    f"the worker {_exit_words(process.returncode)} while it started. Its last lines:\n{self.last_lines}"
                )
            if self._stopping.is_set():
                raise WorkerLostError("the worker was stopped while it started")
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"the worker was not ready after {self._start_timeout_s:g} s (start_timeout_s). "
                    f"Its last lines:\n{self.last_lines}"
                )
            await asyncio.sleep(POLL_S)


def _exit_words(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        hint = ": out of memory?" if -returncode == signal.SIGKILL else ""
        return f"was ended by signal {-returncode} ({signal.strsignal(-returncode)}{hint})"
    return f"ended with exit code {returncode}"


async def _answers(address: str) -> bool:
    try:
        if address.startswith("unix:"):
            _, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


def local_worker(settings: Settings, model_path: Path, served_name: str, folder: Path) -> WorkerProcess:
    """A worker for `model_path`, not started yet, with its socket in `folder`."""
    machine = this_machine()
    launch = launch_message(
        settings,
        address=f"unix:{folder}/worker.sock",
        model_path=model_path,
        served_name=served_name,
        progress=sys.stderr.isatty() and settings.log_format == "text",
        machine=machine,
    )
    environment = worker_environment(launch, machine, os.environ)
    return WorkerProcess(launch, environment=environment, start_timeout_s=settings.start_timeout_s, command=COMMAND)
