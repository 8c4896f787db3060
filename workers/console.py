"""What a worker says on standard error: log lines, and how far loading is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from cluster.protocol import Launch

log = logging.getLogger(__name__)

QUIET_BYTES = 1 << 30  # loading less than this is over before anybody reads about it


class _JsonFormatter(logging.Formatter):
    """One object a line, with the same keys as the gateway's."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def set_up_logging(level: str, log_format: str) -> None:
    """Log lines on stderr, as text or as one JSON object each."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def loading_progress(launch: Launch) -> Callable[[int, int], None]:
    """Called with bytes done and in all: draws a bar where a terminal is behind us, logs each tenth otherwise."""
    return _bar() if launch.progress else _lines()


def _bar() -> Callable[[int, int], None]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    # Our standard error is a pipe to the launcher, which passes it on to its own terminal.
    console = Console(stderr=True, force_terminal=True)
    bar = Progress(
        TextColumn("loading"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    task = bar.add_task("loading", total=None)
    bar.start()

    def draw(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return draw


def _lines() -> Callable[[int, int], None]:
    reported = 0

    def say(done: int, total: int) -> None:
        nonlocal reported
        tenth = 10 * done // max(total, 1)
        if tenth > reported and total >= QUIET_BYTES:
            reported = tenth
            log.info("loading: %d of %d MiB", done >> 20, total >> 20)

    return say
