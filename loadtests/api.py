"""`foretoken bench api`: the API as its users meet it. How much of what they expect is honoured, how soon a wrong
request is refused, what the gateway costs a streamed token, and how well the time to a first token is predicted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.control.model import DEMO_PATH
from cluster.errors import ConfigError, ForetokenError
from cluster.machine import this_machine
from loadtests.api_client import ApiClient, Reply, connected
from loadtests.api_rows import ROWS, ApiRow, NotHonouredError, honoured, need, ok, refused
from loadtests.processes import (
    BenchError,
    Server,
    own_server,
    served_model,
)
from loadtests.report import Row, print_table, write_json
from loadtests.running import ended_by_sigterm, progress
from loadtests.workload import random_prompts, word_ids

BENCH = "api"
START_S = 600.0
NUM_STREAMS = 64
CONCURRENCY = (1, 8, 32)
CAPABILITY = "expected", "capability_honoured", "ratio"
REFUSED = tuple((case, "refusal_p99_s", "s") for case in ("idle", f"streams{NUM_STREAMS}"))
OVERHEAD = f"streams{NUM_STREAMS}", "stream_overhead_s", "s"
PREDICTED = tuple(
    (case, "ttft_prediction_error", "ratio") for case in (*(f"concurrent{num}" for num in CONCURRENCY), "all")
)
WRONG_REQUESTS: tuple[dict[str, Any], ...] = (  # of /v1/completions
    {"data": b"{"},
    {"data": b'{"a":' * 500 + b"1" + b"}" * 500},
    {"json": {"prompt": "Hi", "temperature": 9}},
    {"json": {"prompt": "Hi", "colour": "red"}},
    {"json": {"prompt": "Hi", "max_tokens": "many"}},
    {"json": {"prompt": "Hi", "logprobs": 21}},
    {"json": {"prompt": "Hi", "max_tokens": 10**7}},
    {"json": {"prompt": [-1]}},
    {"json": {"prompt": "word " * 20_000}},
    {"json": {"model": "other", "prompt": "Hi"}},
)


@dataclass(frozen=True)
class Scale:
    refusals: int  # rounds of all
    stream_tokens: int
    predictions: int  # by concurrency
    prompts: tuple[int, int]  # shortest, longest prompt of a prediction
    outputs: tuple[int, int]


FULL = Scale(refusals=20, stream_tokens=128, predictions=96, prompts=(16, 768), outputs=(16, 96))
QUICK = Scale(refusals=5, stream_tokens=32, predictions=32, prompts=(16, 256), outputs=(8, 32))


@dataclass(frozen=True)
class Options:
    quick: bool = False
    json_path: Path | None = None
    base_url: str | None = None
    model: str | None = None  # None: the demo model

    @property
    def scale(self) -> Scale:
        return QUICK if self.quick else FULL


class ApiBench:
    """One server, and what is asked of it."""

    def __init__(self, options: Options, server: Server, words: list[int], say: Callable[[str], None]) -> None:
        self._scale = options.scale
        self._options = options
        self._server = server
        self._words = words
        self._say = say

    async def rows(self) -> list[Row]:
        async with connected(self._server.base_url, self._server.model) as api:
            warm = await api.complete()
            need(warm.status == 200, f"a completion gave HTTP {warm.status}: {warm.text[:200]}")
            return [
                *await self._or_why_not((CAPABILITY,), lambda: self._capabilities(api)),
                *await self._or_why_not(REFUSED, lambda: self._refusals(api)),
                *await self._or_why_not((OVERHEAD,), lambda: self._overhead(api)),
                *await self._or_why_not(PREDICTED, lambda: self._predictions(api)),
            ]

    async def _or_why_not(
        self, promised: tuple[tuple[str, str, str], ...], measure: Callable[[], Awaitable[list[Row]]]
    ) -> list[Row]:
        self._say(promised[0][1])
        try:
            return await measure()
        except (BenchError, NotHonouredError) as error:
            return [
                Row(bench=BENCH, case=case, metric=metric, unit=unit, reason=str(error))
                for case, metric, unit in promised
            ]

    # ------------------------------------------------------------------------------------------------- capabilities

    async def _capabilities(self, api: ApiClient) -> list[Row]:
        expected = [*ROWS]
        if self._options.base_url is None:
            expected.append(ApiRow("keys", lambda _: check_keys(self._options, self._words[:8])))
        found = [await honoured(api, each) for each in expected]
        wrong = [why for why in found if why]
        case, metric, unit = CAPABILITY
        share = (len(expected) - len(wrong)) / len(expected)
        note = f"{len(expected)} rows; " + ("not: " + "; ".join(wrong) if wrong else "all of them")
        note += "; a model whose template knows no tools or thoughts refuses them by name, which counts"
        return [Row(bench=BENCH, case=case, metric=metric, unit=unit, value=share, note=note, goal="1")]

    # ----------------------------------------------------------------------------------------------------- refusals

    async def _refusals(self, api: ApiClient) -> list[Row]:
        idle = await self._refusal_times(api)
        async with self._streaming(api):
            busy = await self._refusal_times(api)
        return [
            _refusal_row("idle", idle, "nothing else to do"),
            _refusal_row(f"streams{NUM_STREAMS}", busy, f"beside {NUM_STREAMS} streams"),
        ]

    async def _refusal_times(self, api: ApiClient) -> list[float]:
        times = []
        for _ in range(self._scale.refusals):
            for request in WRONG_REQUESTS:
                reply = await api.ask("POST", "/v1/completions", **request)
                need(reply.status in (400, 404), f"HTTP {reply.status} for {str(request)[:80]}")
                times.append(reply.duration_s)
        return times

    @contextlib.asynccontextmanager
    async def _streaming(self, api: ApiClient) -> AsyncIterator[None]:
        """Streams beside what is done here, begun anew as they end."""

        async def stream() -> None:
            while True:
                ok_stream(await self._stream(api))

        tasks = [asyncio.create_task(stream()) for _ in range(NUM_STREAMS)]
        try:
            await api.first_token([1], 1)  # which waits behind theirs: they run now
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self, api: ApiClient) -> Reply:
        return await api.complete(stream=True, temperature=0, ignore_eos=True, max_tokens=self._scale.stream_tokens)

    # ----------------------------------------------------------------------------------------------------- overhead

    async def _overhead(self, api: ApiClient) -> list[Row]:
        pid = self._server.pid
        if pid is None:
            raise BenchError("needs a server of its own: leave --base-url out")
        before_s = processor_s(pid)
        replies = await asyncio.gather(*(self._stream(api) for _ in range(NUM_STREAMS)))
        spent_s = processor_s(pid) - before_s
        for reply in replies:
            ok_stream(reply)
        num_tokens = NUM_STREAMS * self._scale.stream_tokens
        case, metric, unit = OVERHEAD
        note = f"processor time of the gateway's process for each of {num_tokens} tokens, one event each"
        return [Row(bench=BENCH, case=case, metric=metric, unit=unit, value=spent_s / num_tokens, note=note)]

    # -------------------------------------------------------------------------------------------------- predictions

    async def _predictions(self, api: ApiClient) -> list[Row]:
        rows, errors = [], []
        for seed, num in enumerate(CONCURRENCY):
            found = await self._prediction_errors(api, num, seed)
            errors += found
            rows.append(_prediction_row(f"concurrent{num}", found, f"{num} at once"))
        return [*rows, _prediction_row("all", errors, "all of these")]

    async def _prediction_errors(self, api: ApiClient, num_at_once: int, seed: int) -> list[float]:
        """|predicted - measured| / measured of requests of mixed lengths, `num_at_once` at any time."""
        (shortest, longest), (fewest, most) = self._scale.prompts, self._scale.outputs
        count = self._scale.predictions
        lengths = [shortest + (longest - shortest) * (7 * i % count) // count for i in range(count)]
        outputs = [fewest + (most - fewest) * (11 * i % count) // count for i in range(count)]
        waiting = list(zip(random_prompts(self._words, lengths, seed), outputs, strict=True))
        errors: list[float] = []

        async def work() -> None:
            while waiting:
                predicted_s, measured_s = await api.first_token(*waiting.pop())
                errors.append(abs(predicted_s - measured_s) / measured_s)

        await asyncio.gather(*(work() for _ in range(num_at_once)))
        return errors


def ok_stream(reply: Reply) -> None:
    need(reply.status == 200 and reply.text.endswith("data: [DONE]\n\n"), f"a stream broke: {reply.text[-200:]}")


def _refusal_row(case: str, times: list[float], note: str) -> Row:
    p99 = sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]
    kinds = f"{len(times)} wrong requests of {len(WRONG_REQUESTS)} kinds"
    note = f"{kinds} one after the other, {note}; baseline: their median"
    median = statistics.median(times)
    return Row(
        bench=BENCH, case=case, metric="refusal_p99_s", unit="s", value=p99, baseline=median, note=note, goal="<= 0.05"
    )


def _prediction_row(case: str, errors: list[float], note: str) -> Row:
    text = f"median of |predicted - measured| / measured over {len(errors)} requests, {note}"
    value = statistics.median(errors)
    return Row(bench=BENCH, case=case, metric="ttft_prediction_error", unit="ratio", value=value, note=text)


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process has had. Raises `BenchError` where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError as error:
        raise BenchError(f"this system does not tell the processor time of a process: {error.strerror}") from None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def check_keys(options: Options, prompt_ids: list[int]) -> None:
    """A server with a key is closed without it, but for its health."""
    key = secrets.token_urlsafe(24)
    with own_server(options.model, prompt_ids, num_threads=1, deadline_s=START_S, key=key) as server:
        async with connected(server.base_url, server.model) as stranger:
            refused(await stranger.complete(), 401, code="invalid_api_key")
            refused(await stranger.get("/metrics"), 401)
            need((await stranger.get("/health/live")).status == 200, "the health route is closed")
        async with connected(server.base_url, server.model, key) as known:
            ok(await known.complete())


# ----------------------------------------------------------------------------------------------------- the command


def run(options: Options, say: Callable[[str], None]) -> list[Row]:
    """Every row, measured or with the reason why not. Raises `BenchError` where the server does not serve."""
    words = word_ids(DEMO_PATH if options.model is None else Path(options.model))
    with contextlib.ExitStack() as stack:
        if options.base_url is not None:
            server = Server(options.base_url, served_model(options.base_url))
        else:
            say("starting the server")
            num_threads = this_machine().num_usable_cores
            server = stack.enter_context(
                own_server(options.model, words[:8], num_threads=num_threads, deadline_s=START_S)
            )
        return asyncio.run(ApiBench(options, server, words, say).rows())


def parse(argv: list[str]) -> Options:
    """Raises `ConfigError` for a wrong option; exits as argparse does for unknown ones."""
    parser = argparse.ArgumentParser(prog="foretoken bench api", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every row with less work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as one JSON array as well")
    parser.add_argument("--model", metavar="PATH", help="a local model folder (default: the demo model)")
    parser.add_argument("--base-url", metavar="URL", help="measure this server, which serves --model, and start none")
    given = parser.parse_args(argv)
    if given.model is not None and not (Path(given.model) / "config.json").is_file():
        raise ConfigError(f"--model {given.model} is not a folder with a config.json", param="model")
    if given.base_url is not None and not given.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"--base-url {given.base_url} must begin with http:// or https://", param="base_url")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {given.json}: there is no such folder", param="json")
    base_url = None if given.base_url is None else given.base_url.rstrip("/").removesuffix("/v1")
    return Options(quick=given.quick, json_path=given.json, base_url=base_url, model=given.model)


def main(argv: list[str] | None = None) -> int:
    """Run the bench, print its table, write its JSON; 0 when it ran, whatever it found."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        with ended_by_sigterm(), progress() as say:
            rows = run(options, say)
    except (BenchError, NotHonouredError, ForetokenError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print_table(rows)
    if options.json_path is not None:
        write_json(rows, options.json_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
