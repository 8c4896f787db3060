"""Workers that are nobody's children: they outlive who started them, and are known by process id and name.

A shell in a session of its own starts the worker and ends, so that the worker belongs to init: it gets no signal that
is meant for us, and leaves no zombie with us. Its `Launch` goes through its standard input; on its command line there
is nothing but its name. What it prints goes to a log file. It says that it serves, and where, in a file beside that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from cluster.control.last_words import last_lines, refusal, tail
from cluster.control.launch import COMMAND, POLL_S
from cluster.errors import DeadlineError, WorkerLostError
from cluster.protocol import Announcement, Launch

MODULE = "workers.server"
NUM_OLD_LOGS = 3
PS_TIMEOUT_S = 5.0
EXEC_LOOKS, EXEC_POLL_S = 20, 0.005  # at a process that shows no command line
SHELL_TIMEOUT_S = 30.0  # for the shell that starts it to say the id
END_TIMEOUT_S = 5.0  # from SIGKILL until a process is gone
# A command in the background reads /dev/null unless its input is another descriptor's.
START = 'exec 3<&0; "$@" <&3 3<&- >&2 & echo $!'


def start_detached(
    launch: Launch,
    environment: Mapping[str, str],
    log_path: Path,
    timeout_s: float,
    *,
    command: Sequence[str] = COMMAND,
    give_up: threading.Event | None = None,
) -> Announcement:
    """Start a worker and wait until it serves; blocks. Its announcement and process id are kept beside `log_path`.

    A worker of this name that an earlier call left behind is killed first. Where it ends before it serves it raises
    `StartRefusedError` with its own `error:` line, or without one `WorkerLostError` with its last lines, as it does
    where `give_up` is set; `DeadlineError` after `timeout_s`. No process is left behind.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    announce_path, pid_path = log_path.with_suffix(".json"), log_path.with_suffix(".pid")
    _end_predecessor(pid_path, launch.name)
    _rotate(log_path)
    announce_path.unlink(missing_ok=True)
    launch = msgspec.structs.replace(launch, announce_path=str(announce_path), exit_with_parent=False)
    pid = _start(launch, environment, log_path, command)
    try:
        pid_path.write_text(str(pid), encoding="ascii")
        deadline = time.monotonic() + timeout_s
        while (announcement := _announced(announce_path, pid)) is None:
            if not is_running(pid, launch.name):
                raise _how_it_ended(log_path)
            if give_up is not None and give_up.is_set():
                raise WorkerLostError("the worker was stopped while it started")
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"the worker was not ready after {timeout_s:g} s (start_timeout_s). Its last lines:\n"
                    f"{last_lines(tail(log_path))}"
                )
            time.sleep(POLL_S)
        return announcement
    except BaseException:
        end(pid, launch.name, kill=True)
        raise


def is_running(pid: int, name: str = "") -> bool:
    """Whether `pid` is a worker called `name` ("": any), alive or hung; not another program that got the id later."""
    arguments = _arguments(pid)
    return MODULE in arguments and (not name or name in arguments)


def end(pid: int, name: str = "", *, kill: bool) -> None:
    """SIGTERM, or with `kill` SIGKILL, to the worker `name` with that id; nothing where it is gone."""
    if is_running(pid, name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)


def _arguments(pid: int) -> list[str]:
    """The command line of a process; empty where there is none, a zombie included."""
    if pid <= 0:
        return []
    try:
        for _ in range(EXEC_LOOKS):
            if line := Path(f"/proc/{pid}/cmdline").read_bytes():
                return line.decode(errors="replace").split("\0")
            if _is_zombie(pid):
                break
            time.sleep(EXEC_POLL_S)  # a process that becomes another program has none for a moment
        return []
    except OSError:
        if Path("/proc/self").exists():
            return []
    ps = ("ps", "-p", str(pid), "-o", "command=")  # a system without /proc
    return subprocess.run(ps, capture_output=True, text=True, timeout=PS_TIMEOUT_S, check=False).stdout.split()


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")


def _start(launch: Launch, environment: Mapping[str, str], log_path: Path, command: Sequence[str]) -> int:
    """The process id of a worker that has its launch message. Raises `WorkerLostError` and `DeadlineError`."""
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            ("/bin/sh", "-c", START, "sh", *command, launch.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=dict(environment),
            start_new_session=True,
        ) as shell,
    ):
        try:
            said, _ = shell.communicate(msgspec.json.encode(launch) + b"\n", SHELL_TIMEOUT_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise DeadlineError(
                f"{launch.name} did not take its launch message within {SHELL_TIMEOUT_S:g} s: this machine may be out "
                "of processes or memory"
            ) from None
    if not said.strip().isdigit():
        raise WorkerLostError(f"the shell did not start {launch.name}. Its last lines:\n{last_lines(tail(log_path))}")
    return int(said)


def _announced(path: Path, pid: int) -> Announcement | None:
    try:
        announcement = msgspec.json.decode(path.read_bytes(), type=Announcement)
    except FileNotFoundError:
        return None
    return announcement if announcement.pid == pid else None


def _end_predecessor(pid_path: Path, name: str) -> None:
    try:
        pid = int(pid_path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return
    end(pid, name, kill=True)
    deadline = time.monotonic() + END_TIMEOUT_S
    while is_running(pid, name):
        if time.monotonic() > deadline:
            raise WorkerLostError(f"the process {pid} of {name} does not end, so that no other can take its place")
        time.sleep(POLL_S)
    pid_path.unlink(missing_ok=True)


def _rotate(log_path: Path) -> None:
    """Keep the logs of the last starts: ``expert-0.log.1`` is the one before."""
    names = [log_path, *(log_path.with_name(f"{log_path.name}.{n}") for n in range(1, NUM_OLD_LOGS + 1))]
    for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
        with contextlib.suppress(FileNotFoundError):
            newer.replace(older)


def _how_it_ended(log_path: Path) -> WorkerLostError:
    """Of a worker that ended before it served."""
    printed = tail(log_path)
    return refusal(printed) or WorkerLostError(
        f"the worker ended while it started. Its last lines ({log_path}):\n{last_lines(printed)}"
    )
