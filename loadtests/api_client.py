"""The client of `bench api`: requests one at a time over one session, their replies whole or as a stream's events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from cluster.gateway.replies import PREDICTED_TTFT_HEADER
from loadtests.processes import BenchError

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    text: str
    duration_s: float  # from the send to the last byte

    @property
    def body(self) -> Any:
        """Raises `BenchError` where the reply is no JSON."""
        try:
            return json.loads(self.text)
        except json.JSONDecodeError:
            raise BenchError(f"HTTP {self.status} with what is no JSON: {self.text[:200]!r}") from None

    @property
    def events(self) -> list[Any]:
        """Of a stream: each event's data, as JSON but for the closing `[DONE]`."""
        found = [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]
        return [data if data == "[DONE]" else json.loads(data) for data in found]


class ApiClient:
    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self._session = session
        self.model = model

    async def ask(self, method: str, path: str, **options: Any) -> Reply:
        """Raises `BenchError` where no reply comes."""
        started = time.perf_counter()
        try:
            async with self._session.request(method, path, **options) as response:
                text = (await response.read()).decode("utf-8", "replace")
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status, headers, text, time.perf_counter() - started)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{method} {path}: {error!r}") from None

    async def get(self, path: str) -> Reply:
        return await self.ask("GET", path)

    async def post(self, path: str, **body: Any) -> Reply:
        return await self.ask("POST", path, json={"model": self.model} | body)

    async def complete(self, **body: Any) -> Reply:
        return await self.post("/v1/completions", **({"prompt": "Hello", "max_tokens": 8} | body))

    async def chat(self, **body: Any) -> Reply:
        messages = [{"role": "user", "content": "Say hello."}]
        return await self.post("/v1/chat/completions", **({"messages": messages, "max_tokens": 16} | body))

    async def first_token(self, prompt: list[int], num_tokens: int) -> tuple[float, float]:
        """Stream a completion to its end; -> what was predicted for its first token, and what that took, in seconds."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
        }
        started = time.perf_counter()
        try:
            async with self._session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    raise BenchError(f"a completion gave HTTP {response.status}: {(await response.text())[:200]}")
                predicted_ms = response.headers.get(PREDICTED_TTFT_HEADER)
                if predicted_ms is None:
                    raise BenchError(f"the server predicts no time to first token: no header {PREDICTED_TTFT_HEADER}")
                await response.content.readany()
                measured_s = time.perf_counter() - started
                await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"a stream broke: {error!r}") from None
        return float(predicted_ms) / 1e3, measured_s

    async def leave_a_stream(self) -> None:
        """Begin a long stream, read its first bytes, and close the connection."""
        body = {"model": self.model, "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        try:
            response = await self._session.post("/v1/completions", json=body)
            if response.status != 200:
                raise BenchError(f"a completion gave HTTP {response.status}: {(await response.text())[:200]}")
            await response.content.readany()
            response.close()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"a stream broke: {error!r}") from None


@asynccontextmanager
async def connected(base_url: str, model: str, key: str | None = None) -> AsyncIterator[ApiClient]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(
        base_url,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        yield ApiClient(session, model)
