from __future__ import annotations

from pathlib import Path

from cluster.control.last_words import TAIL_LINES, last_lines, last_word, refusal, tail
from cluster.errors import StartImpossibleError, StartRefusedError


def test_the_last_word_is_all_that_follows_a_line_of_an_error() -> None:
    assert last_word(b"loading; error: only a warning\nerror: no such file\nlook there\n") == "no such file\nlook there"
    assert last_word(b"loading; error: only a warning\n") is None


def test_a_refusal_says_whether_another_try_would_help() -> None:
    assert refusal(b"loading\n") is None
    again = refusal(b"error: out of memory\n")
    assert (type(again), str(again)) == (StartRefusedError, "out of memory")
    never = refusal(b"error: invalid_config: device 'tpu' is none\n")
    assert (type(never), str(never)) == (StartImpossibleError, "device 'tpu' is none")


def test_the_last_lines_are_those_that_say_something() -> None:
    printed = "".join(f"line {i}\n\n" for i in range(20)).encode()
    assert last_lines(printed).splitlines() == [f"line {i}" for i in range(20 - TAIL_LINES, 20)]
    assert last_lines(b"10%\r100%\rdone \xff\n") == "10%\n100%\ndone \ufffd"


def test_a_logs_tail_begins_where_its_process_did(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == b""
    log.write_bytes(b"before" + b"after")
    assert tail(log, start=6) == b"after"
    assert tail(log, 2, start=6) == b"er"
    assert tail(log, 100) == b"beforeafter"
