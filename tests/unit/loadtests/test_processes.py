"""Processes that a bench starts: they answer, fail loudly, and are gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.machine import free_port
from loadtests.processes import (
    BenchError,
    Child,
    LineProcess,
    counters,
    environment,
    get,
    served_model,
    started_together,
    wait_for_first_token,
)
from tests.support.openai_server import DEADLINE_S, OpenAIServer, Reply, running
from tests.support.processes import wait_for_end

ECHO = """
import sys, json
for line in sys.stdin:
    request = json.loads(line)
    if "die" in request:
        print("the last words", file=sys.stderr)
        sys.exit(3)
    if "hang" not in request:
        print(json.dumps(request), flush=True)
"""


@pytest.fixture
def echo(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "echo_lines.py").write_text(ECHO)
    return environment() | {"PYTHONPATH": str(tmp_path)}


def test_a_benchs_own_server_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORETOKEN_API_KEY", "FORETOKEN_API_KEY_FILE", "FORETOKEN_ADMIN_API_KEY", "FORETOKEN_HOME"):
        monkeypatch.setenv(name, "given")
    assert {name for name, value in environment().items() if value == "given"} == {"FORETOKEN_HOME"}


def test_a_line_is_answered_by_a_line(echo: dict[str, str]) -> None:
    with LineProcess("echo_lines", env=echo) as process:
        for number in range(3):
            assert process.ask({"number": number, "text": "x" * 100_000 * number}, DEADLINE_S)["number"] == number


def test_an_error_an_end_and_a_silence_are_errors(echo: dict[str, str]) -> None:
    with LineProcess("echo_lines", env=echo) as process:
        with pytest.raises(BenchError, match="echo_lines: it is wrong"):
            process.ask({"error": "it is wrong"}, DEADLINE_S)
        with pytest.raises(BenchError, match=r"no answer within 0\.1 s"):
            process.ask({"hang": 1}, 0.1)
        for _ in range(2):
            with pytest.raises(BenchError, match=r"exit code 3(?s:.*)the last words"):
                process.ask({"die": 1}, DEADLINE_S)


def test_a_child_is_ended_with_its_children() -> None:
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    child = Child("parent", [sys.executable, "-c", script], os.environ, stdout=subprocess.PIPE)
    with child:
        assert child._process.stdout is not None
        grandchild = int(child._process.stdout.readline())
        child._process.stdout.close()
        os.kill(grandchild, 0)
    assert child._process.returncode == -signal.SIGTERM
    wait_for_end(grandchild, DEADLINE_S)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(BenchError, match="llama-server cannot be started: No such file"):
        Child("llama-server", ["/nowhere/llama-server"], os.environ)


def test_what_a_server_tells() -> None:
    with running(OpenAIServer(num_tokens=100)) as server:
        assert served_model(server.url) == "fake"
        assert counters(server.url)["foretoken:engine_sequence_steps_total"] == 100
        with pytest.raises(BenchError, match="/nothing gave HTTP 404"):
            get(server.url, "/nothing")
    with pytest.raises(BenchError, match="refused"):
        served_model(f"http://127.0.0.1:{free_port()}")


@pytest.fixture
def idle() -> Child:
    return Child("sleeper", ["sleep", "600"], os.environ)


def test_the_first_token_is_waited_for(idle: Child) -> None:
    """A server that is not ready yet refuses; it is asked again."""
    replies = iter([Reply(status=503, error="loading"), Reply(status=503, error="loading"), Reply()])
    with running(OpenAIServer(lambda body: next(replies))) as server, idle:
        assert wait_for_first_token(idle, server.url, [1, 2], DEADLINE_S) == "fake"
    assert [body["max_tokens"] for body in server.bodies] == [1, 1, 1]


def test_a_first_token_that_never_comes_is_told_with_its_cause(idle: Child) -> None:
    with (
        running(OpenAIServer(lambda body: Reply(status=400, error="no ids"))) as server,
        idle,
        pytest.raises(BenchError, match=r"sleeper gave no token within 0\.2 s: .*HTTP 400.*no ids"),
    ):
        wait_for_first_token(idle, server.url, [1], 0.2)


def test_a_server_that_dies_while_it_is_waited_for() -> None:
    script = "import sys; sys.exit('the checkpoint is broken')"
    with (
        Child("server", [sys.executable, "-c", script], os.environ) as child,
        pytest.raises(BenchError, match=r"exit code 1(?s:.*)the checkpoint is broken"),
    ):
        wait_for_first_token(child, f"http://127.0.0.1:{free_port()}", [1], DEADLINE_S)


def test_processes_started_together_end_together_when_one_fails() -> None:
    entered, left = [], []

    @contextlib.contextmanager
    def process(name: str) -> Iterator[str]:
        barrier.wait(DEADLINE_S)  # nobody passes before all are starting
        if name == "bad":
            raise BenchError("it does not start")
        entered.append(name)
        try:
            yield name
        finally:
            left.append(name)

    barrier = threading.Barrier(2)
    with started_together(process("a"), process("b")) as names:
        assert names == ["a", "b"]
    assert sorted(left) == ["a", "b"]
    with pytest.raises(BenchError, match="does not start"), started_together(process("a"), process("bad")):
        pass
    assert entered.count("a") == left.count("a") == 2
