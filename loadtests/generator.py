"""The load generator: `python -m loadtests.generator [--job FILE] [--out FILE]`, or `--lines` for one job a line.

Open loop: a request is sent when its time has come, however slow the answers to the others are. It runs in a process
of its own, so that the server's work does not delay the load, and reports how late its own sends were. A job is JSON
(`Job`), the result JSON too (`loadtests.measures.summarize`).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec

from cluster.errors import ForetokenError, InvalidValueError
from cluster.event_loop import loop_factory
from loadtests.measures import Record, Slo, summarize
from loadtests.workload import Arrivals, Burst, LoadRequest, arrivals_of, check_arrivals

DONE = b"[DONE]"
MAX_ERROR_CHARS = 300


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A load and where to send it. `body` goes into every request; `seed` is of the arrivals."""

    base_url: str  # http://host:port
    model: str
    requests: list[LoadRequest]
    arrivals: Arrivals = Burst()
    seed: int = 0
    endpoint: Literal["/v1/completions", "/v1/chat/completions"] = "/v1/completions"
    body: dict[str, Any] = {}
    headers: dict[str, str] = {}
    slo: Slo | None = None
    timeout_s: float = 600.0  # of one request, from its send


def read_job(text: bytes) -> Job:
    """A checked job. Raises `InvalidValueError` naming the field that is wrong."""
    try:
        job = msgspec.json.decode(text, type=Job)
    except msgspec.DecodeError as error:
        raise InvalidValueError(f"the job cannot be read: {error}") from None
    if not job.base_url.startswith(("http://", "https://")):
        raise InvalidValueError(f"base_url must begin with http:// or https://, got {job.base_url!r}", param="base_url")
    if not job.requests:
        raise InvalidValueError("requests is empty: there is nothing to send", param="requests")
    if not 0 < job.timeout_s < float("inf"):
        raise InvalidValueError(f"timeout_s must be a positive number, got {job.timeout_s}", param="timeout_s")
    check_arrivals(job.arrivals, len(job.requests))
    return job


# ------------------------------------------------------------------------------------------------------ one request


class Chunk(msgspec.Struct):
    """What matters of one event of the stream."""

    choices: list[dict[str, Any]] = []
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | str | None = None


DECODER = msgspec.json.Decoder(Chunk)


def carries_tokens(choice: dict[str, Any]) -> bool:
    """Whether a choice of a chunk stands for generated tokens, not for a role or an end alone."""
    if (delta := choice.get("delta")) is not None:
        return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))
    return bool(choice.get("text")) or choice.get("finish_reason") is None


class StreamReader:
    """Takes an answer's bytes as they come, and notes in `record` when tokens came and how many they were."""

    def __init__(self, record: Record, now: Callable[[], float]) -> None:
        self.record = record
        self._now = now
        self._rest = b""
        self._num_events = 0
        self._done = False

    def feed(self, data: bytes) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def close(self) -> None:
        """The answer is over: say what is missing of it, if anything."""
        record = self.record
        if not record.error and not self._done:
            record.error = "the stream ended before [DONE]"
        if not record.error and not record.token_times_s:
            record.error = "the stream had no tokens"
        record.output_tokens = record.output_tokens or self._num_events

    def _event(self, data: bytes) -> None:
        if data == DONE:
            self._done = True
            return
        chunk = DECODER.decode(data)
        if chunk.error is not None:
            message = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
            self.record.error = str(message)[:MAX_ERROR_CHARS] or "an error without a message"
        if any(carries_tokens(choice) for choice in chunk.choices):
            self.record.token_times_s.append(self._now())
            self._num_events += 1
        if chunk.usage is not None:
            self.record.input_tokens = chunk.usage.get("prompt_tokens", 0)
            self.record.output_tokens = chunk.usage.get("completion_tokens", 0)


def request_body(job: Job, request: LoadRequest) -> bytes:
    """The JSON that is sent. `job.body` and, over it, `request.body` win over what is filled in here."""
    prompt = "messages" if job.endpoint.endswith("/chat/completions") else "prompt"
    body = {
        "model": job.model,
        prompt: request.prompt,
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body | job.body | request.body)


class Client:
    """Sends a job's requests over one session, without a limit to its connections."""

    def __init__(self, job: Job, session: aiohttp.ClientSession, now: Callable[[], float]) -> None:
        self._job = job
        self._session = session
        self._now = now
        self._url = job.base_url.rstrip("/") + job.endpoint
        self._headers = {"Content-Type": "application/json", **job.headers}

    async def send(self, due_s: float, request: LoadRequest) -> Record:
        """Send now and read the answer to its end. Whatever goes wrong is in the record."""
        body = request_body(self._job, request)
        record = Record(due_s, self._now())
        reader = StreamReader(record, self._now)
        try:
            async with asyncio.timeout(self._job.timeout_s):
                async with self._session.post(self._url, data=body, headers=self._headers) as response:
                    if response.status != 200:
                        text = (await response.text(errors="replace"))[:MAX_ERROR_CHARS]
                        record.error = f"HTTP {response.status}: {text}"
                        return record
                    async for data in response.content.iter_any():
                        reader.feed(data)
        except TimeoutError:
            record.error = record.error or f"no end within {self._job.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            record.error = record.error or f"{type(error).__name__}: {error}"
        reader.close()
        return record


# --------------------------------------------------------------------------------------------------------- the load


async def send_all(
    source: Iterator[tuple[float, LoadRequest]],
    send: Callable[[float, LoadRequest], Coroutine[Any, Any, Record]],
    now: Callable[[], float],
) -> list[Record]:
    """Start each request of `source` at its time and wait for all answers: nothing waits for an earlier answer."""
    tasks: list[asyncio.Task[Record]] = []
    async with asyncio.TaskGroup() as group:
        for due_s, request in source:
            while (wait_s := due_s - now()) > 0:  # a timer may be early
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(send(due_s, request)))
    return [task.result() for task in tasks]


async def run_job(job: Job) -> dict[str, Any]:
    """Send the load, -> its measures."""
    timeout = aiohttp.ClientTimeout(total=None)  # each request has its own
    connector = aiohttp.TCPConnector(limit=0, limit_per_host=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session:
        started = time.perf_counter()

        def now() -> float:
            return time.perf_counter() - started

        source = arrivals_of(job.requests, job.arrivals, job.seed)
        records = await send_all(source, Client(job, session, now).send, now)
    return summarize(records, model=job.model, slo=job.slo)


def result_of(text: bytes) -> dict[str, Any]:
    """A job's measures, or `{"error": …}` for one that cannot be run."""
    try:
        job = read_job(text)
    except ForetokenError as error:
        return {"error": error.message}
    gc.collect()
    gc.freeze()  # what lives already is not looked through again: that would show as latency of the server
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(run_job(job))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtests.generator", description="Send a load and measure the answers.")
    parser.add_argument("--job", type=Path, help="the job, a JSON file (default: standard input)")
    parser.add_argument("--out", type=Path, help="where the JSON result goes (default: standard output)")
    parser.add_argument("--lines", action="store_true", help="read one job a line, write one result a line")
    options = parser.parse_args(argv)
    if options.lines:
        for line in iter(sys.stdin.buffer.readline, b""):
            sys.stdout.buffer.write(msgspec.json.encode(result_of(line)) + b"\n")
            sys.stdout.buffer.flush()
        return 0
    result = result_of(sys.stdin.buffer.read() if options.job is None else options.job.read_bytes())
    text = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    if options.out is None:
        sys.stdout.buffer.write(text)
    else:
        options.out.write_bytes(text)
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
