"""The processes that a bench starts and ends: line-speaking helpers, and servers of our own or of others."""

from __future__ import annotations

import contextlib
import http.client
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Self, TypeVar
from urllib.parse import urlsplit

import msgspec

from cluster.environment import python_path
from cluster.machine import free_port

KEYS = frozenset({"FORETOKEN_API_KEY", "FORETOKEN_API_KEY_FILE", "FORETOKEN_ADMIN_API_KEY"})
STOP_TIMEOUT_S = 20.0
POLL_S = 0.01
HTTP_TIMEOUT_S = 30.0
TAIL_LINES = 12
T = TypeVar("T")


class BenchError(Exception):
    """A process of the bench did not do its part; the message says which, and the last that it printed."""


def python_command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(**changes: str) -> dict[str, str]:
    """Ours, with our packages first on the path, and without keys: a bench's servers are on loopback, and open."""
    kept = {name: value for name, value in os.environ.items() if name not in KEYS}
    return {**kept, "PYTHONPATH": python_path(os.environ), **changes}


class Child:
    """A process in a session of its own, ended with all that it started. What it prints on stderr is kept."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], **pipes: Any) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command, env=dict(env), start_new_session=True, stderr=self._log, **{"stdout": self._log, **pipes}
            )
        except OSError as error:
            self._log.close()
            raise BenchError(f"{name} cannot be started: {error.strerror}: {command[0]}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_alive(self) -> None:
        """Raise `BenchError` where the process has ended."""
        if (code := self._process.poll()) is not None:
            raise BenchError(f"{self.name} ended with exit code {code}{self.last_lines()}")

    def last_lines(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return "".join(f"\n  {line}" for line in lines)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to whatever is left of its session after the timeout."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


class LineProcess(Child):
    """A module of ours that answers each line of JSON with one."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        command = python_command(module, *arguments)
        super().__init__(module, command, env or environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._rest = b""

    def ask(self, message: object, deadline_s: float) -> dict[str, Any]:
        """The answer to `message`. Raises `BenchError` where it is an error, or does not come in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            self.check_alive()
        answer = msgspec.json.decode(self._read_line(deadline_s), type=dict[str, Any])
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        super().stop()
        self._process.stdout.close()

    def _read_line(self, deadline_s: float) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise BenchError(f"{self.name} gave no answer within {deadline_s:g} s{self.last_lines()}")
                data = os.read(self._process.stdout.fileno(), 1 << 20)
                if not data:
                    self._process.wait()
                    self.check_alive()
                self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line


@contextlib.contextmanager
def started_together(*managers: contextlib.AbstractContextManager[T]) -> Iterator[list[T]]:
    """What `managers` give, all entered at the same time: a process spends most of its start waiting or on one core."""
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(len(managers)) as pool:
            entered = list(pool.map(stack.enter_context, managers))
        yield entered


# ---------------------------------------------------------------------------------------------------------- servers


@dataclass(frozen=True)
class Server:
    """A server that answers: where it is, and what it calls its model."""

    base_url: str
    model: str
    first_token_s: float | None = None  # from the command to the first token, where it was ours to start
    pid: int | None = None  # of its gateway's process, likewise


@contextlib.contextmanager
def connected(base_url: str, timeout_s: float = HTTP_TIMEOUT_S) -> Iterator[http.client.HTTPConnection]:
    """A connection to a server; its methods raise `OSError` or `HTTPException`."""
    parts = urlsplit(base_url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        yield connection
    finally:
        connection.close()


def get(base_url: str, path: str, key: str | None = None) -> bytes:
    """The body of a page. Raises `BenchError` where there is none."""
    try:
        with connected(base_url) as connection:
            connection.request("GET", path, headers=_authorization(key))
            response = connection.getresponse()
            body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"GET {base_url}{path} failed: {error}") from None
    if response.status != 200:
        raise BenchError(f"GET {base_url}{path} gave HTTP {response.status}: {body[:200]!r}")
    return body


def _authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def served_model(base_url: str, key: str | None = None) -> str:
    """The first model that a server lists."""
    try:
        return str(msgspec.json.decode(get(base_url, "/v1/models", key))["data"][0]["id"])
    except (msgspec.DecodeError, KeyError, IndexError, TypeError) as error:
        raise BenchError(f"{base_url}/v1/models lists no model: {error!r}") from None


def counters(base_url: str) -> dict[str, float]:
    """Each metric of `/metrics`, summed over its labels."""
    totals: dict[str, float] = {}
    for line in get(base_url, "/metrics").decode("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def wait_for_first_token(
    child: Child, base_url: str, prompt_ids: Sequence[int], deadline_s: float, key: str | None = None
) -> str:
    """Ask until a token comes; -> the model's name. Raises `BenchError` when the process ends or the time is over."""
    end = time.monotonic() + deadline_s
    last = "it never listened"
    while time.monotonic() < end:
        child.check_alive()
        try:
            model = served_model(base_url, key)
            _ask_for_one_token(base_url, model, prompt_ids, key)
            return model
        except BenchError as error:
            last = str(error)
        time.sleep(POLL_S)
    raise BenchError(f"{child.name} gave no token within {deadline_s:g} s: {last}{child.last_lines()}")


def _ask_for_one_token(base_url: str, model: str, prompt_ids: Sequence[int], key: str | None) -> None:
    body = {"model": model, "prompt": list(prompt_ids), "max_tokens": 1, "stream": True, "temperature": 0}
    try:
        with connected(base_url) as connection:
            headers = {"Content-Type": "application/json"} | _authorization(key)
            connection.request("POST", "/v1/completions", msgspec.json.encode(body), headers)
            response = connection.getresponse()
            text = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"a completion failed: {error}") from None
    if response.status != 200 or b'"choices"' not in text:
        raise BenchError(f"a completion gave HTTP {response.status}: {text[:200]!r}")


@contextlib.contextmanager
def own_server(
    model: str | None,
    prompt_ids: Sequence[int],
    *flags: str,
    num_threads: int,
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    key: str | None = None,
) -> Iterator[Server]:
    """`foretoken serve [model] flags` on a free port, ended afterwards. `env` None: ours; `key`: that it asks for."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    arguments = [*([model] if model else []), "--port", str(port), "--num-threads", str(num_threads), *flags]
    started = time.perf_counter()
    variables = dict(env or environment()) | ({} if key is None else {"FORETOKEN_API_KEY": key})
    with Child("foretoken serve", python_command("cluster.cli", "serve", *arguments), variables) as child:
        name = wait_for_first_token(child, base_url, prompt_ids, deadline_s, key)
        yield Server(base_url, name, time.perf_counter() - started, child.pid)
