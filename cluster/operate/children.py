"""The processes of a cluster on this machine: started, kept up, ended, and found again by a mark.

Each child runs in a session of its own, with its output in a log file. Every process that comes of one inherits the
mark in its environment, so that what a dead supervisor left behind can be ended as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.control.failures import Failures, backoff_s
from cluster.control.last_words import last_lines, tail
from cluster.environment import MARK
from cluster.errors import WorkerLostError

logger = logging.getLogger(__name__)

POLL_S = 0.05
GRACE_S = 5.0
OUTPUT_BYTES = 2**16
SWEEP_TIMEOUT_S = 5.0  # from SIGKILL until processes are gone
LAST_PAUSE_S = 2.0  # the longest before it is started again: a cluster has only one of each
MAX_LOG_BYTES = 16 * 2**20  # a log that is longer when its process starts is put aside


@dataclass
class Child:
    """One process, and after a death its successor."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    log_path: Path
    stdin: bytes = field(default=b"", repr=False)  # what it reads; without it a pipe that ends when this process does
    grace_s: float = GRACE_S  # it may take so long to end; 0: it has nothing to bring to an end
    on_change: Callable[[], None] = lambda: None  # it has another process id now, or none
    is_answering: Callable[[float], Awaitable[bool]] | None = None  # within seconds; None: there is nothing to ask
    before_start: Callable[[], None] = lambda: None
    may_start: Callable[[], bool] = lambda: True  # again, after a death: what it needs is there
    niceness: int = 0  # of its session among all sessions of this machine; below 0 only where that is permitted
    log_start: int = 0  # where in the log its present process began
    _process: subprocess.Popen[bytes] | None = None
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    @property
    def output(self) -> str:
        """What its present process printed, of that the end."""
        return tail(self.log_path, OUTPUT_BYTES, self.log_start).decode("utf-8", errors="replace")

    @property
    def last_lines(self) -> str:
        return last_lines(tail(self.log_path, OUTPUT_BYTES, self.log_start))

    def start(self) -> None:
        """Raises `WorkerLostError` where there is no such program, or no room for its log."""
        try:
            self.before_start()
            with contextlib.suppress(FileNotFoundError):
                if self.log_path.stat().st_size > MAX_LOG_BYTES:
                    self.log_path.replace(self.log_path.with_name(f"{self.log_path.name}.1"))
            with self.log_path.open("ab") as log:
                self.log_start = os.fstat(log.fileno()).st_size
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(self.environment),
                    start_new_session=True,
                )
        except OSError as error:
            raise WorkerLostError(f"{self.name} cannot be started: {error}") from None
        if self.niceness:
            with contextlib.suppress(OSError):  # not permitted, or a kernel without autogroups
                Path(f"/proc/{self._process.pid}/autogroup").write_text(str(self.niceness), encoding="ascii")
        assert self._process.stdin is not None
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(self.stdin)
                self._process.stdin.close()
        self.on_change()

    def check(self) -> None:
        """Raises `WorkerLostError` with its last lines where it has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise WorkerLostError(
                f"{self.name} ended with exit code {code}. Its last lines ({self.log_path}):\n{self.last_lines}"
            )

    async def keep_up(self) -> None:
        """Start it again whenever it dies, after growing pauses and once it may, until it is stopped."""
        failures = Failures(lambda num_in_a_row: min(LAST_PAUSE_S, backoff_s(num_in_a_row)))
        while not self._stopping.is_set():
            started = time.monotonic()
            while self.pid is not None:
                if await self._stopped_within(POLL_S):
                    return
            self.on_change()
            failures.note_death(time.monotonic() - started)
            code = None if self._process is None else self._process.returncode
            await asyncio.to_thread(self.end_session)
            logger.error("%s ended (exit code %s, see %s); starting it again", self.name, code, self.log_path)
            if await self._stopped_within(failures.pause_s):
                return
            while not self.may_start():
                if await self._stopped_within(POLL_S):
                    return
            try:
                self.start()
            except WorkerLostError as error:
                logger.error("%s", error.message)

    @property
    def is_given_up(self) -> bool:
        return self._stopping.is_set()

    def give_up(self) -> None:
        """From now on it is not started again."""
        self._stopping.set()

    def kill(self) -> None:
        """SIGKILL to its process; `keep_up` does the rest."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after its grace; whatever is left of its session is ended as well."""
        self.give_up()
        if self.grace_s > 0 and self.pid is not None:
            assert self._process is not None
            self._process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + self.grace_s
            while self.pid is not None and time.monotonic() < deadline:
                await asyncio.sleep(POLL_S)
            if self.pid is not None:
                logger.warning("%s did not end within %g s and was killed", self.name, self.grace_s)
        await asyncio.to_thread(self.end_session)

    def end_session(self) -> None:
        """SIGKILL to the child and to all that it started in its session, and wait for the child; blocks."""
        if self._process is None:
            return
        for pid in in_session(self._process.pid):
            if self.environment.get(MARK) == _mark_of(pid):  # its id may be another program's by now
                _kill(pid)
        if self._process.poll() is None:  # it may show no mark
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SWEEP_TIMEOUT_S)
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()


def marked(run_id: str, folder: str = "") -> list[int]:
    """The processes with this mark, and the Redis whose socket is in `folder`, but not the one that asks.

    Redis writes its title over its environment, and so over the mark; the title has its socket.
    """
    title = f"unixsocket:{folder}/".encode() if folder else None
    return [
        pid
        for pid in _processes()
        if pid != os.getpid() and (run_id == _mark_of(pid) or (title is not None and title in _read(pid, "cmdline")))
    ]


def sweep(run_id: str, folder: str = "") -> int:
    """End every process that is `marked` (SIGKILL) and wait until they are gone; how many there were. Blocks."""
    seen: set[int] = set()
    deadline = time.monotonic() + SWEEP_TIMEOUT_S
    while (found := marked(run_id, folder)) and time.monotonic() < deadline:
        for pid in found:
            _kill(pid)
        seen.update(found)
        time.sleep(POLL_S)
    return len(seen)


def _mark_of(pid: int) -> str | None:
    start = f"{MARK}=".encode()
    for variable in _read(pid, "environ").split(b"\0"):
        if variable.startswith(start):
            return variable.removeprefix(start).decode(errors="replace")
    return None


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    """A zombie's environment is empty."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it ended, or is another user's
        return b""


def in_session(session: int) -> list[int]:
    """The processes of the session that `session` leads or led; Linux."""
    found = []
    for pid in _processes():
        fields = _read(pid, "stat").rpartition(b")")[2].split()
        if len(fields) > 3 and int(fields[3]) == session:
            found.append(pid)
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
