"""`foretoken serve` as a process, with a scripted worker process in place of the engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cluster.config import load
from cluster.control.model import Model, default_name
from cluster.environment import PACKAGES
from cluster.errors import ConfigError
from cluster.protocol import Hello
from cluster.serve import (
    SPARE_FILES,
    announce,
    base_url,
    connection_bound,
    curl_line,
    gateway_settings,
    is_loopback,
    listen,
    with_keys,
)
from tests.support.processes import has_ended, wait_for_end
from tests.support.scripted_process import save_tokenizer

DEADLINE_S = 30.0
ANSWER = "Hello, wörld! 🦀"
CHAT = {"model": "foretoken-demo", "messages": [{"role": "user", "content": "Hi"}]}


@dataclass
class Served:
    """A running `foretoken serve` and what it has said so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""
    _said: threading.Condition = field(default_factory=threading.Condition)

    def listen_to(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()
        with self._said:
            self.lines.append("(end)")
            self._said.notify_all()

    def wait_for(self, text: str, after: int = 0) -> str:
        """The first line that has `text`."""
        found: list[str] = []

        def is_said() -> bool:
            found[:] = [line for line in self.lines[after:] if text in line]
            return bool(found) or "(end)" in self.lines

        with self._said:
            assert self._said.wait_for(is_said, DEADLINE_S), f"{text!r} was not said: {self.lines}"
        assert found, f"{text!r} was not said: {self.lines}"
        return found[0]

    def worker_pid(self) -> int:
        words = [line for line in self.lines if " serves " in line][-1].split()
        return int(words[words.index("worker") + 1])

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


Start = Callable[..., Served]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    save_tokenizer(tmp_path)
    with ExitStack() as stack:

        def run(*arguments: str, wait: bool = True, **environment: str) -> Served:
            clean = {name: value for name, value in os.environ.items() if not name.startswith("FORETOKEN_")}
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.scripted_process", "serve", "--port", "0", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=PACKAGES,
                env=clean | {"SCRIPTED_MODEL": str(tmp_path)} | environment,
            )
            stack.enter_context(process)  # closes the pipe and waits
            stack.callback(process.kill)
            served = Served(process)
            reader = threading.Thread(target=served.listen_to)
            reader.start()
            stack.callback(reader.join)
            stack.callback(process.kill)
            if wait:
                served.url = served.wait_for("ready on ").split("ready on ")[1].split()[0]
            return served

        yield run


def test_serves_until_sigterm_then_ends_every_child_with_exit_code_0(start: Start) -> None:
    served = start()
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, timeout=DEADLINE_S).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    worker_pid = served.worker_pid()
    served.signal()
    assert served.wait() == 0
    assert has_ended(worker_pid)
    served.wait_for("(end)")
    assert not [line for line in served.lines if "Traceback" in line or "ERROR" in line]


def test_a_folder_is_served_under_its_name(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    save_tokenizer(folder)
    served = start(str(folder))
    models = httpx.get(f"{served.url}/v1/models", timeout=DEADLINE_S).json()
    assert [model["id"] for model in models["data"]] == ["my-model"]
    served.signal()
    assert served.wait() == 0


def test_a_connection_that_ends_early_or_is_no_http_has_its_error(start: Start, tmp_path: Path) -> None:
    served = start(SCRIPTED_GATE=str(tmp_path / "never"))
    body = json.dumps(CHAT).encode()
    whole = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    for data, says in ((whole, "sending side"), (whole[:-9], "whole body"), (b"GARBAGE\r\n\r\n", "no HTTP/1.1")):
        with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0), DEADLINE_S) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as answer:
                head, _, content = answer.read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert says in json.loads(content)["error"]["message"]
    served.signal()
    assert served.wait() == 0


def test_a_worker_that_ends_while_we_drain_is_not_started_again(start: Start, tmp_path: Path) -> None:
    served = start("--drain-timeout", "600", SCRIPTED_GATE=str(tmp_path / "never"))
    with httpx.Client(base_url=served.url, timeout=DEADLINE_S) as client:
        replies: list[httpx.Response] = []
        running = threading.Thread(target=lambda: replies.append(client.post("/v1/chat/completions", json=CHAT)))
        running.start()
        _wait_for_open_requests(client, 1)
        worker_pid = served.worker_pid()
        served.signal()
        served.wait_for("stopping")
        os.kill(worker_pid, signal.SIGKILL)
        running.join(DEADLINE_S)
        assert replies[0].json()["error"]["code"] == "worker_lost"
    assert served.wait() == 0
    served.wait_for("(end)")
    assert not [line for line in served.lines if "starting it again" in line]


def test_ctrl_c_lets_a_stream_finish_and_admits_nothing_more(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    served = start(SCRIPTED_GATE=str(gate))
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=served.url, timeout=DEADLINE_S))
        replies: list[str] = []
        running = threading.Thread(
            target=lambda: replies.append(client.post("/v1/chat/completions", json=CHAT | {"stream": True}).text)
        )
        running.start()
        _wait_for_open_requests(client, 1)
        served.signal(signal.SIGINT)
        served.wait_for("stopping")
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        gate.touch()
        running.join(DEADLINE_S)
        assert replies[0].rstrip().endswith("data: [DONE]")
    assert served.wait() == 0


def test_what_outlasts_the_drain_ends_with_an_error(start: Start, tmp_path: Path) -> None:
    served = start("--drain-timeout", "0.2", SCRIPTED_GATE=str(tmp_path / "never"))
    with httpx.Client(base_url=served.url, timeout=DEADLINE_S) as client:
        replies: list[httpx.Response] = []
        running = threading.Thread(target=lambda: replies.append(client.post("/v1/chat/completions", json=CHAT)))
        running.start()
        _wait_for_open_requests(client, 1)
        served.signal()
        running.join(DEADLINE_S)
        assert replies[0].status_code == 503
        assert "shut down" in replies[0].json()["error"]["message"]
    assert served.wait() == 0


def test_a_second_signal_ends_at_once(start: Start, tmp_path: Path) -> None:
    served = start("--drain-timeout", "600", SCRIPTED_GATE=str(tmp_path / "never"))
    worker_pid = served.worker_pid()
    with httpx.Client(base_url=served.url, timeout=DEADLINE_S) as client:
        running = threading.Thread(target=_ignore_errors, args=(client,))
        running.start()
        _wait_for_open_requests(client, 1)
        served.signal()
        served.wait_for("stopping")
        served.signal()
        assert served.wait() == 130
        running.join(DEADLINE_S)
    wait_for_end(worker_pid, DEADLINE_S)


def _ignore_errors(client: httpx.Client) -> None:
    with pytest.raises(httpx.HTTPError):
        client.post("/v1/chat/completions", json=CHAT)


def _wait_for_open_requests(client: httpx.Client, number: int) -> None:
    line = f'foretoken:http_open_requests{{model_name="foretoken-demo"}} {number:.1f}'
    deadline = time.monotonic() + DEADLINE_S
    while line not in client.get("/metrics").text:
        assert time.monotonic() < deadline, f"there were never {number} open requests"


def test_a_dead_worker_is_replaced_and_its_requests_go_on(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    served = start(SCRIPTED_GATE=str(gate))
    first_pid = served.worker_pid()
    with httpx.Client(base_url=served.url, timeout=DEADLINE_S) as client:
        replies: list[str] = []
        body = CHAT | {"stream": True}
        running = threading.Thread(target=lambda: replies.append(client.post("/v1/chat/completions", json=body).text))
        running.start()
        _wait_for_open_requests(client, 1)
        gate_line = len(served.lines)
        os.kill(first_pid, signal.SIGKILL)
        served.wait_for("signal 9 (Killed", after=gate_line)
        gate.touch()
        running.join(DEADLINE_S)
        *chunks, done = [line.removeprefix("data: ") for line in replies[0].splitlines() if line]
        assert done == "[DONE]"
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
        assert 'foretoken:requests_resumed_total{model_name="foretoken-demo"} 1.0' in client.get("/metrics").text
        assert client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"] == ANSWER
    assert served.worker_pid() != first_pid
    served.signal()
    assert served.wait() == 0
    served.wait_for("(end)")
    assert not [line for line in served.lines if "fork" in line]  # gRPC's own word on our starting a process


def test_the_page_is_served(start: Start) -> None:
    served = start()
    assert "<title>Foretoken</title>" in httpx.get(served.url, timeout=DEADLINE_S).text
    shown = httpx.get(f"{served.url}/cluster", timeout=DEADLINE_S).json()
    assert (shown["model"], shown["problem"]) == ("foretoken-demo", None)
    assert shown["nodes"][0]["memory_bytes"] > 0
    served.signal()
    assert served.wait() == 0


def test_a_worker_that_cannot_start_is_the_servers_error(start: Start) -> None:
    served = start(wait=False, SCRIPTED_REFUSAL="config.json: no field 'rope'")
    assert served.wait() == 1
    assert served.wait_for("Error: ") == "Error: config.json: no field 'rope'\n"
    served.wait_for("(end)")
    assert not [line for line in served.lines if "Traceback" in line]


def test_a_port_in_use_is_one_line(start: Start) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        served = start("--port", str(port), wait=False)
        assert served.wait() == 1
    served.wait_for("(end)")
    assert served.lines[:-1] == [
        f"Error: port {port} on 127.0.0.1 is in use: end what uses it, or choose another with --port\n"
    ]


def test_json_logs_are_json_on_every_line(start: Start) -> None:
    served = start("--log-format", "json", wait=False)
    ready = json.loads(served.wait_for("ready on "))
    assert ready["logger"] == "cluster.serve"
    served.signal()
    assert served.wait() == 0
    served.wait_for("(end)")
    assert all(json.loads(line)["level"] == "info" for line in served.lines[:-1])


# ------------------------------------------------------------------------------------------------------ the parts


def test_listen_takes_the_port_at_once() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert base_url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match="is in use") as caught:
            listen("127.0.0.1", port)
        assert caught.value.param == "port"


def test_listen_on_every_address_shows_the_loopback_one() -> None:
    with listen("0.0.0.0", 0) as listener:
        assert base_url(listener).startswith("http://127.0.0.1:")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_listen_names_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match=host) as caught:
        listen(host, 0)
    assert caught.value.param == "host"


@pytest.mark.parametrize(
    ("address", "is_ours"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False)],
)  # fmt: skip
def test_which_addresses_are_loopback(address: str, is_ours: bool) -> None:
    listener: Any = SimpleNamespace(getsockname=lambda: (address, 8000))
    assert is_loopback(listener) == is_ours


def test_a_key_is_made_where_one_is_needed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    local: Any = SimpleNamespace(getsockname=lambda: ("127.0.0.1", 80))
    public: Any = SimpleNamespace(getsockname=lambda: ("0.0.0.0", 80))
    assert with_keys(load(), local).api_key is None
    given = load({"api_key": "k" * 16})
    assert with_keys(given, public) is given
    assert with_keys(given, local) is given
    for log_format in ("text", "json"):
        capsys.readouterr()
        settings = with_keys(load({"host": "0.0.0.0", "log_format": log_format}), public)
        assert settings.api_key is not None
        key = settings.api_key.get_secret_value()
        shown = capsys.readouterr()
        assert shown.err.count(key) == 1
        assert key not in shown.out + caplog.text
        if log_format == "json":
            assert json.loads(shown.err)["api_key"] == key
        assert with_keys(settings, public) is settings, "and stays"
        assert "FORETOKEN_API_KEY" in curl_line("http://h", "m", has_key=True)
    only_admin = with_keys(load({"admin_api_key": "a" * 16}), public)
    assert only_admin.api_key is not None


@pytest.mark.parametrize(
    "given",
    [
        {"api_key": "short"},
        {"api_key": "  "},
        {"api_key": "#"},
        {"admin_api_key": "short"},
        {"api_key_file": "/no/such"},
    ],
)
def test_keys_that_cannot_be_used_are_refused_at_the_start(given: dict[str, str]) -> None:
    listener: Any = SimpleNamespace(getsockname=lambda: ("0.0.0.0", 80))
    with pytest.raises(ConfigError, match="key"):
        with_keys(load(given), listener)


def test_the_files_a_process_may_open_bound_its_connections() -> None:
    program = (
        "import resource, sys; from cluster.serve import connection_bound; soft, hard, wanted = map(int, sys.argv[1:]);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)); print(connection_bound(wanted))"
    )

    def bound(*numbers: int) -> int:
        command = [sys.executable, "-c", program, *map(str, numbers)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGES).stdout)

    assert bound(1000, 2000, 500) == 500
    assert bound(300, 2000, 1000) == 1000, "the softer limit is raised"
    assert bound(300, 600, 1000) == 600 - SPARE_FILES
    assert connection_bound(1) == 1


def test_an_open_address_needs_the_key_that_is_printed(start: Start) -> None:
    served = start("--host", "0.0.0.0", wait=False)
    key = served.wait_for("export FORETOKEN_API_KEY=").strip().removeprefix("export FORETOKEN_API_KEY=")
    url = served.wait_for("ready on ").split("ready on ")[1].split()[0]
    assert httpx.get(f"{url}/v1/models", timeout=DEADLINE_S).status_code == 401
    assert httpx.get(f"{url}/health", timeout=DEADLINE_S).status_code == 200
    header = {"authorization": f"Bearer {key}"}
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=header, timeout=DEADLINE_S).status_code == 200
    served.signal()
    assert served.wait() == 0
    served.wait_for("(end)")
    assert sum(key in line for line in served.lines) == 1
    assert '-H "Authorization: Bearer $FORETOKEN_API_KEY"' in "".join(served.lines)


def test_the_curl_line_survives_a_name_with_quotes() -> None:
    line = curl_line("http://127.0.0.1:8000", 'it\'s "mine"')
    body = subprocess.run(
        ["sh", "-c", f"printf %s {line.split(' -d ')[1]}"], capture_output=True, text=True, check=True
    )
    assert json.loads(body.stdout)["model"] == 'it\'s "mine"'


def test_the_summary_off_a_terminal_is_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    hello = Hello(
        version=1, worker_id="w", served_name="m", max_model_len=4096, vocab_size=8,
        checkpoint="c0ffee", dtype="float32", numerics="invariant", arithmetic="ours", num_pages=9, page_size=64,
        model_type="qwen3_moe", num_parameters=11_600_000, num_experts=64, num_layers=8,
        token_budget=2048, max_num_seqs=64,
    )  # fmt: skip
    with caplog.at_level("INFO"):
        announce(hello, "http://127.0.0.1:1", load(), 3.21)
    text = "\n".join(caplog.messages)
    assert "m: qwen3_moe, 11.6 M parameters, 8 layers, 64 experts a layer" in text
    assert "page: http://127.0.0.1:1/ shows" in text
    assert "ready on http://127.0.0.1:1 after 3.2 s; try: curl -sN http://127.0.0.1:1/v1/chat/completions" in text


def test_the_gateway_is_told_the_settings(tmp_path: Path) -> None:
    key = "k" * 16
    settings = load(
        {
            "drain_timeout_s": 1.5,
            "request_timeout_s": 7,
            "max_open_requests": 3,
            "max_open_requests_per_tenant": 2,
            "share_prefix_cache": True,
            "max_ttft_s": 2.5,
            "vllm_metrics": True,
            "api_key": f"a:{key}",
        }
    )
    told: Any = gateway_settings(settings, Model("m", tmp_path))
    assert (told.served_name, told.model_path) == ("m", tmp_path)
    assert (told.drain_timeout_s, told.request_timeout_s, told.max_open_requests) == (1.5, 7, 3)
    assert (told.max_open_requests_per_tenant, told.share_prefix_cache) == (2, True)
    assert (told.max_ttft_s, told.vllm_metrics) == (2.5, True)
    assert told.keys.caller(key).tenant == "a"
    assert key not in repr(told)


def test_a_folder_goes_by_its_name_and_an_id_by_itself(tmp_path: Path) -> None:
    assert default_name(str(tmp_path)) == tmp_path.name
    assert default_name("Qwen/Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"
