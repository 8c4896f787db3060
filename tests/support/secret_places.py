"""Where secrets are: in which processes' environments and command lines, and in which files."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

LOOKS = 100  # at a process that becomes another program meanwhile


@dataclass(frozen=True)
class Process:
    """What everybody sees of it, and the environment that it was started with, as its user sees it."""

    pid: int
    command: str
    environment: bytes


def look_at(pid: int) -> Process | None:
    """None: it has ended."""
    for _ in range(LOOKS):
        before = _read(pid, "cmdline")
        environment = _read(pid, "environ")
        if before == _read(pid, "cmdline"):
            command = before.replace(b"\0", b" ").decode(errors="replace").strip()
            return Process(pid, command, environment) if before else None
    raise AssertionError(f"the process {pid} does not come to rest")


def variables(process: Process) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in process.environment.decode(errors="replace").split("\0")]
    return {name: value for name, _, value in pairs if name}


def found_in(content: bytes, secrets: Mapping[str, str]) -> set[str]:
    """The names of the secrets that stand there."""
    return {name for name, secret in secrets.items() if secret.encode() in content}


def files_with(folders: Iterable[Path], secrets: Mapping[str, str]) -> dict[Path, tuple[set[str], int]]:
    """Files that hold secrets: which, and the file's mode."""
    found = {}
    for path in [path for folder in folders for path in folder.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # Ray takes some away
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and (names := found_in(path.read_bytes(), secrets)):
                found[path] = (names, stat.S_IMODE(status.st_mode))
    return found


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
