"""What a controller knew, on its machine's disk, for the next one there: whom it led, and as whom.

A controller that starts while the store is away cannot lead: for all it knows, another does. It can *hold* what its
predecessor led, by saying what that one said: a `Lead` of the same epoch and id. That renews the workers' leases and
orders nothing; a worker that has obeyed another controller since refuses it, as it would refuse the predecessor. The
file's lock is held for as long as a controller lives, so that never two say the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cluster.errors import ConfigError
from cluster.files import LockedError, locked, write_whole
from cluster.protocol import Lead, Message
from cluster.store.records import UNREADABLE, WorkerRecord

logger = logging.getLogger(__name__)

NAME = "controller.json"
LOCK_NAME = "controller.lock"
LOCK_TIMEOUT_S = 5.0  # for a predecessor that is just ending
NOTHING = b"null"  # in the place of a placement


class Known(Message, frozen=True):
    """The file."""

    lead: Lead
    workers: dict[str, WorkerRecord]  # by name
    placement: msgspec.Raw = msgspec.Raw(NOTHING)  # as in the store


class LastKnown:
    """The file in a folder whose lock is held; made by `open_last_known`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._written = b""
        self._fault = ""  # of the latest write

    def read(self) -> Known | None:
        """What the predecessor left."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Known)
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE) as error:
            logger.warning("what the controller before this one knew is lost, %s: %s", self._path, error)
            return None

    def write(self, known: Known) -> None:
        """Keep `known`; where the disk takes nothing, only the next controller misses it."""
        value = msgspec.json.encode(known)
        if value == self._written:
            return
        try:
            write_whole(self._path, value)
        except OSError as error:
            if str(error) != self._fault:  # once, not at each turn of the loop
                logger.warning("%s cannot be written: %s", self._path, error)
            self._fault = str(error)
        else:
            self._written, self._fault = value, ""

    def forget(self) -> None:
        """Nothing is led any more."""
        self._written = b""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def open_last_known(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[LastKnown]:
    """Raises `ConfigError` where another controller has the folder after `timeout_s`, or it cannot be written."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK_NAME, timeout_s))
        except LockedError:
            raise ConfigError(f"another controller runs with the folder {folder}", param="folder") from None
        except OSError as error:
            raise ConfigError(f"cannot write to the folder {folder}: {error.strerror}", param="folder") from None
        yield LastKnown(folder)
