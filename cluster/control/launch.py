"""Starts a worker as a child of this process, watches it, restarts it and ends it.

A worker is ``python -m workers.server``. It gets a `Launch` as one JSON line on its standard input, which then stays
open: its end tells the worker that its parent is gone. What it prints is passed on to our standard error, and the last
of it is kept for the error message should it die. A line that begins with ``error: `` is its last word on why it cannot
start: that becomes the error itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from cluster.config import Settings
from cluster.environment import child_environment
from cluster.errors import DeadlineError, StartRefusedError, WorkerLostError
from cluster.machine import X86, Machine, this_machine
from cluster.protocol import Launch

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "workers.server")
MAX_EQUAL_START_FAILURES = 3
STABLE_S = 60.0  # a worker that lived this long starts again without waiting
POLL_S = 0.02
MAX_SOCKET_PARENT = 70  # a socket's whole path may have 103 bytes on macOS, 107 on Linux
TAIL_BYTES = 4096
TAIL_LINES = 8
LAST_WORD = re.compile(rb"^error: (.*)", re.MULTILINE | re.DOTALL)


def backoff_s(num_failures: int) -> float:
    """Seconds to wait before the restart after this many deaths in a row: 0, 0.5, 1, 2 … 10."""
    return 0.0 if num_failures <= 1 else min(10.0, 0.5 * 2 ** (num_failures - 2))


def logs_folder(settings: Settings) -> Path:
    """Where the processes of a cluster log on this machine."""
    return settings.home / "clusters" / settings.cluster_name / "logs"


def kernels_dir(settings: Settings) -> Path:
    """Where compiled kernels are kept."""
    return settings.home / "kernels"


def launch_message(
    settings: Settings, *, address: str, model_path: Path, served_name: str, progress: bool, machine: Machine
) -> Launch:
    """A worker's options from the settings and the machine that it starts on."""
    return Launch(
        address=address,
        model_path=str(model_path),
        served_name=served_name,
        device=settings.device,
        numerics=settings.numerics,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        host_memory_bytes=machine.available_bytes,
        token_budget=settings.token_budget,
        page_size=settings.page_size,
        kv_cache_bytes=None if settings.kv_cache_bytes is None else int(settings.kv_cache_bytes),  # not pydantic's type
        prefix_cache=settings.prefix_cache,
        static_batching=settings.static_batching,
        num_threads=settings.num_threads,
        kernels_dir=str(kernels_dir(settings)) if settings.host_kernels else None,
        drain_timeout_s=settings.drain_timeout_s,
        log_level=settings.log_level,
        log_format=settings.log_format,
        progress=progress,
    )


def worker_environment(launch: Launch, machine: Machine, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: no secret, and what must stand before torch is imported.

    ``MKL_CBWR`` holds Intel's MKL to one order of additions whatever the number of rows (numerics class `invariant`).
    A container's CPU quota is not seen by OpenMP, which would start a thread for each core of the machine.
    """
    environment = child_environment(inherited)
    invariant = launch.numerics == "invariant" or (launch.numerics == "auto" and not launch.device.startswith("cuda"))
    if invariant and machine.architecture in X86:
        for flag, isa in (("avx512f", "AVX512"), ("avx2", "AVX2")):
            if flag in machine.cpu_flags:
                environment["MKL_CBWR"] = f"{isa},STRICT"
                break
    num_threads = launch.num_threads
    if num_threads is None and machine.num_usable_cores < machine.num_cores:
        num_threads = machine.num_usable_cores
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(num_threads)
    return environment


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
        lines = self._tail.decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
        return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])

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
        num_failures = 0
        last_error, num_equal = "", 0
        while not self._stopping.is_set():
            assert self._process is not None
            started = time.monotonic()
            await self._reap()
            if self._stopping.is_set():
                return
            num_failures = 1 if time.monotonic() - started > STABLE_S else num_failures + 1
            logger.error("the worker %s; starting it again", _exit_words(self._process.returncode))
            while not await self._stopped_within(self._backoff(num_failures)):
                try:
                    await self.start()
                    last_error, num_equal = "", 0
                    break
                except (WorkerLostError, DeadlineError) as error:
                    if self._stopping.is_set():
                        return
                    num_failures += 1
                    num_equal = num_equal + 1 if error.message == last_error else 1
                    last_error = error.message
                    if num_equal == MAX_EQUAL_START_FAILURES:
                        raise WorkerLostError(f"gave up after {num_equal} equal failures: {error.message}") from error
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
            last_word = None if self._is_ready else LAST_WORD.search(self._tail)
            shown = self._tail[len(self._tail) - len(chunk) : last_word.start() if last_word else None]
            del self._tail[:-TAIL_BYTES]
            with contextlib.suppress(OSError, ValueError):  # our own standard error may be gone
                self._output.write(shown)
                self._output.flush()

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not await _answers(self.launch.address):
            if process.returncode is not None:
                await self._reap()
                if last_word := LAST_WORD.search(self._tail):
                    raise StartRefusedError(last_word[1].decode("utf-8", errors="replace").strip())
                raise WorkerLostError(
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


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder that only this user can open, for workers' sockets; removed with what is in it."""
    parent = tempfile.gettempdir()
    if len(parent) > MAX_SOCKET_PARENT:
        parent = "/tmp"
    with tempfile.TemporaryDirectory(prefix="foretoken-", dir=parent) as name:  # made with mode 0700
        yield Path(name)


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
