"""What a running `cluster up` leaves for `status` and `down` on the same machine: one file, and a lock on another.

The lock is held as long as the supervisor lives, however it ends; the file holds secrets and is its user's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

import msgspec

from cluster.config import Settings
from cluster.control.worker_folders import logs_folder
from cluster.errors import ConfigError
from cluster.files import LockedError, is_locked, locked, write_whole
from cluster.protocol import Message
from cluster.store.records import UNREADABLE

logger = logging.getLogger(__name__)

RETRY_S = 1.0
DEFAULT_NAME = Settings.model_fields["cluster_name"].default
SECRET_FOLDER = 0o700


class SupervisorState(Message, frozen=True):
    """`state.json`."""

    pid: int  # of the supervisor
    run_id: str  # in the environment of every process that it started
    folder: str  # sockets and what else lasts as long as the cluster
    url: str  # of the gateway
    store: str  # with its password
    drain_timeout_s: float  # that it was started with: its end may take so long
    children: dict[str, int] = msgspec.field(default_factory=dict)  # name -> process id, those that run now

    def __repr__(self) -> str:
        """What may be shown: not how to get at the store."""
        return f"SupervisorState(pid={self.pid}, run_id={self.run_id!r}, url={self.url!r}, children={self.children})"


class KeptState:
    """Keeps the file true: `write` after each change, on the event loop, and `close` at the end."""

    def __init__(self, files: ClusterFiles, state: Callable[[], SupervisorState]) -> None:
        self._files = files
        self._state = state
        self._is_written = False
        self._retry: asyncio.TimerHandle | None = None

    def write(self) -> None:
        """Raises `OSError` the first time alone: later a full disk holds up nobody, and is tried again."""
        try:
            self._files.write(self._state())
        except OSError as error:
            if not self._is_written:
                raise
            if self._retry is None:
                logger.error("%s cannot be written, which is tried again: %s", self._files.state, error)
            self.close()
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self.write)
        else:
            self._is_written = True
            self.close()

    def close(self) -> None:
        """Try nothing more."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None


class ClusterFiles:
    """Where a cluster's files are on this machine."""

    def __init__(self, settings: Settings) -> None:
        self.name = settings.cluster_name
        self.logs = logs_folder(settings)
        self.folder = self.logs.parent
        self.state = self.folder / "state.json"
        self.lock = self.folder / "lock"

    @property
    def flag(self) -> str:
        """What `status` and `down` need beside their name to find this cluster."""
        return "" if self.name == DEFAULT_NAME else f" --cluster-name {self.name}"

    def read(self) -> SupervisorState | None:
        """The state that the last supervisor wrote, alive or not; None where it took it away at its end."""
        try:
            return msgspec.json.decode(self.state.read_bytes(), type=SupervisorState)
        except (OSError, *UNREADABLE):
            return None

    def write(self, state: SupervisorState) -> None:
        write_whole(self.state, msgspec.json.encode(state))

    def remove(self) -> None:
        self.state.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, timeout_s: float = 0.0) -> Iterator[None]:
        """Be the one who runs, or cleans up after, the cluster of this name.

        Raises `ConfigError` where another still is after `timeout_s`.
        """
        try:
            self.logs.mkdir(mode=SECRET_FOLDER, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.logs} cannot be made: {error.strerror}; choose another --home", param="home"
            ) from error
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.lock, timeout_s))
            except LockedError:
                state = self.read()
                who = f" (process {state.pid})" if state else ""
                raise ConfigError(
                    f"a cluster called {self.name} runs on this machine{who}: stop it with `foretoken cluster "
                    f"down{self.flag}`, or choose another --cluster-name",
                    param="cluster_name",
                ) from None
            yield

    def is_held(self) -> bool:
        """Whether a supervisor lives."""
        return is_locked(self.lock)


def nothing_runs(settings: Settings) -> str:
    """That no cluster of this name runs here; which others do."""
    folders = sorted((settings.home / "clusters").glob("*/lock"))
    others = ", ".join(f"--cluster-name {lock.parent.name}" for lock in folders if is_locked(lock))
    return f"no cluster called {settings.cluster_name} runs here" + (f"; these do: {others}" if others else "")
