"""Where log lines go and how they look. Called once, by the command that starts the process.

Lines never hold a prompt or an answer: callers log ids, counts and times. Whatever a line holds, it stays one and moves
no cursor: control characters and Unicode's line separators are escaped, and further lines (of a traceback) indented.
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import orjson

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_QUIET = ("httpx", "httpcore", "huggingface_hub", "filelock", "asyncio")
# C0 but tab and line feed, DEL, C1 (NEL among them), line and paragraph separator, and what turns text around
_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]")


def _escaped(text: str) -> str:
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What a caller passed as ``extra=``, such as ``request_id``."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class TextFormatter(logging.Formatter):
    """``12:03:14 INFO cluster.serve: ready on …``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return _escaped(super().format(record)).replace("\n", "\n  ")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339), level, logger, message, then the caller's fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _escaped(orjson.dumps(entry, default=str).decode())  # within strings alone, where \uXXXX is the same


def configure(level: str, log_format: Literal["text", "json"], stream: TextIO | None = None) -> None:
    """Send every logger's lines to `stream` (None: standard error) from `level` on, in the given format."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))  # we say the same ourselves
