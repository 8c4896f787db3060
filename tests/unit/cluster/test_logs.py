from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

import pytest

from cluster import logs


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_text_lines_show_level_logger_and_message() -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logging.getLogger("cluster.test").info("took %d s", 3, extra={"request_id": "r1"})
    logging.getLogger("cluster.test").debug("not shown")
    line = stream.getvalue()
    assert line.endswith("INFO cluster.test: took 3 s\n")
    assert line.count("\n") == 1


def test_json_lines_are_objects_with_the_exception_inside() -> None:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("cluster.test").exception("failed", extra={"request_id": "r1", "odd": {1, 2}})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("error", "cluster.test", "failed")
    assert entry["request_id"] == "r1"
    assert "two\nlines" in entry["exception"]
    assert datetime.fromisoformat(entry["time"]).tzinfo is not None


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_text_makes_a_line_or_moves_a_cursor(log_format: Literal["text", "json"]) -> None:
    stream = io.StringIO()
    logs.configure("info", log_format, stream)
    nasty = "a\r\x1b[2J\x00\x7f\x85\x9b\u2028\u2029\u202e\u2066é🦀\\z"
    logging.getLogger("cluster.test").warning("%s", nasty, extra={"request_id": nasty})
    text = stream.getvalue()
    assert len(text.splitlines()) == 1
    assert text.removesuffix("\n").isprintable()
    assert "é🦀" in text
    if log_format == "json":
        assert (json.loads(text)["message"], json.loads(text)["request_id"]) == (nasty, nasty)


def test_further_lines_of_text_are_indented() -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logging.getLogger("cluster.test").warning("%s", "one\n12:00:00 INFO cluster.serve: forged")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("WARNING cluster.test: one")
    assert second == "  12:00:00 INFO cluster.serve: forged"


def test_libraries_that_chatter_are_held_to_warnings() -> None:
    stream = io.StringIO()
    logs.configure("debug", "text", stream)
    logging.getLogger("httpx").info("GET /secret?prompt=x")
    logging.getLogger("httpx").warning("broken")
    assert "secret" not in stream.getvalue()
    assert "broken" in stream.getvalue()
