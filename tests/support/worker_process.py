"""Real worker processes, and both kinds of stream to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
import msgspec

from cluster.protocol import (
    CONTROL_METHOD,
    STATE_METHOD,
    STREAM_METHOD,
    TOKEN_KEY,
    Announcement,
    Beat,
    EngineState,
    FromWorker,
    Hello,
    Launch,
    Lead,
    RequestOutput,
    Sampling,
    StepOutput,
    Stopping,
    Submit,
    WorkerReport,
)
from tests.support.checkpoints import CONFIG, random_tensors, write
from tests.support.numerics import KERNELS_DIR
from tests.support.tokenizers_ import build

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0  # of every wait in a test
POLL_S = 0.01
TINY = {**CONFIG, "vocab_size": 500, "eos_token_id": 3, "max_position_embeddings": 2048, "num_experts": 8}

_encode = msgspec.msgpack.Encoder().encode
_decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
_decode_report = msgspec.msgpack.Decoder(WorkerReport).decode


def tiny_checkpoint(folder: Path) -> Path:
    """A checkpoint of two layers with eight experts each, and a tokenizer."""
    return build("byte_level", write(folder, TINY, random_tensors(TINY)))


class RunningWorker:
    """A `python -m workers.server`, or a program that ends as it; `options` are `Launch`'s."""

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        name: str = "w",
        program: Sequence[str] = ("-m", "workers.server"),
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "address": f"unix:{folder}/{name}.sock",
            "model_path": str(checkpoint),
            "served_name": "tiny",
            "num_threads": 1,
            "kernels_dir": str(KERNELS_DIR),
            "name": name,
        }
        self.launch = Launch(**(defaults | options))
        self.address = self.launch.address
        self.process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(self.launch) + b"\n")
        self.process.stdin.flush()

    def __enter__(self) -> RunningWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    async def announced(self) -> Announcement:
        """What it wrote to `announce_path`, once it has; its address is ours from then on."""
        assert self.launch.announce_path is not None
        path = Path(self.launch.announce_path)
        async with asyncio.timeout(DEADLINE_S):
            while not path.exists():
                assert self.process.poll() is None, "the worker ended before it served"
                await asyncio.sleep(POLL_S)
        announcement = msgspec.json.decode(path.read_bytes(), type=Announcement)
        self.address = announcement.address
        return announcement

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None  # `communicate` must not flush it

    def end(self) -> str:
        """Kill it; what it had written to standard error."""
        self.process.kill()
        return self.process.communicate()[1].decode()


def bearer(token: str | None) -> tuple[tuple[str, str], ...] | None:
    return None if token is None else ((TOKEN_KEY, f"Bearer {token}"),)


class Stream:
    """One gateway's stream."""

    def __init__(self, channel: grpc.aio.Channel, token: str | None = None) -> None:
        self._channel = channel
        self._metadata = bearer(token)
        self._call = channel.stream_stream(STREAM_METHOD)(wait_for_ready=True, metadata=self._metadata)

    async def read(self) -> FromWorker:
        """The next message, a `Beat` as well."""
        body = await asyncio.wait_for(self._call.read(), DEADLINE_S)
        assert body is not grpc.aio.EOF
        return _decode_from_worker(body)

    async def step(self) -> StepOutput:
        while isinstance(message := await self.read(), Beat):
            pass
        assert isinstance(message, StepOutput)
        return message

    async def send(self, message: object) -> None:
        await self._call.write(_encode(message))

    async def outputs(self, name: str) -> list[RequestOutput]:
        """Everything about one request, up to its end."""
        found: list[RequestOutput] = []
        while not found or found[-1].finish is None:
            found += [output for output in (await self.step()).outputs if output.request_id == name]
        return found

    async def tokens(self, name: str, first: int = 0) -> list[int]:
        """The token ids of one request, whose next is number `first`, until its end: each once and in order."""
        outputs = await self.outputs(name)
        token_ids: list[int] = []
        for output in outputs:
            assert output.finish is None or output.finish.reason == "length", output.finish
            assert not output.token_ids or output.index == first + len(token_ids)
            token_ids += output.token_ids
        return token_ids

    async def state(self) -> EngineState:
        body = await self._channel.unary_unary(STATE_METHOD)(b"", timeout=DEADLINE_S, metadata=self._metadata)
        return msgspec.msgpack.decode(body, type=EngineState)

    def cancel(self) -> None:
        self._call.cancel()


@contextlib.asynccontextmanager
async def connect(worker: RunningWorker) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stream = Stream(channel, worker.launch.token)
        hello = await stream.read()
        assert isinstance(hello, Hello)
        assert (hello.served_name, hello.vocab_size, hello.num_experts) == ("tiny", 500, 8)
        yield stream


class ControlStream:
    """One controller's stream to one worker. It leads once, then each time that it is told to."""

    def __init__(
        self, channel: grpc.aio.Channel, epoch: int = 1, controller_id: str = "a", token: str | None = None
    ) -> None:
        self._lead = Lead(epoch=epoch, controller_id=controller_id)
        self._call = channel.stream_stream(CONTROL_METHOD)(wait_for_ready=True, metadata=bearer(token))

    async def send(self, message: object) -> None:
        await asyncio.wait_for(self._call.write(_encode(message)), DEADLINE_S)

    async def lead(self) -> None:
        await self.send(self._lead)

    async def read(self) -> WorkerReport | None:
        """The next report; None at the end of the stream."""
        body = await asyncio.wait_for(self._call.read(), DEADLINE_S)
        return None if body is grpc.aio.EOF else _decode_report(body)

    async def until(self, condition: Callable[[WorkerReport], bool]) -> WorkerReport:
        """The first report for which `condition` holds."""
        async with asyncio.timeout(DEADLINE_S):
            while (report := await self.read()) is not None:
                if condition(report):
                    return report
        raise AssertionError("the control stream ended")

    async def last(self) -> WorkerReport:
        """The report before the end of the stream."""
        last = await self.until(lambda _: True)
        while (report := await self.read()) is not None:
            last = report
        return last

    async def code(self) -> grpc.StatusCode:
        return await asyncio.wait_for(self._call.code(), DEADLINE_S)


@contextlib.asynccontextmanager
async def control(
    address: str, epoch: int = 1, controller_id: str = "a", token: str | None = None
) -> AsyncIterator[ControlStream]:
    """A controller that has said that it leads."""
    async with grpc.aio.insecure_channel(address) as channel:
        controller = ControlStream(channel, epoch, controller_id, token)
        await controller.lead()
        yield controller


def submit(name: str, max_tokens: int = 6, **sampling: Any) -> Submit:
    return Submit(
        request_id=name,
        prompt_ids=(10, 20, 30, 40),
        sampling=Sampling(seed=5, **sampling),
        stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
    )
