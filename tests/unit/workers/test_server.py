"""The worker process as the launcher and the gateway meet it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import msgspec
import pytest

from cluster.protocol import (
    STATE_METHOD,
    STREAM_METHOD,
    Abort,
    EngineState,
    FromWorker,
    Grammar,
    Hello,
    Launch,
    RequestOutput,
    Sampling,
    Stopping,
    Submit,
)
from tests.support.checkpoints import Recipe, make_model, save
from tests.support.numerics import KERNELS_DIR
from tests.support.tokenizers_ import build

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 60.0

pytestmark = pytest.mark.needs("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    recipe = Recipe("qwen3_moe", {"vocab_size": 500, "eos_token_id": 3, "max_position_embeddings": 2048})
    save(make_model(recipe), folder)
    return build("byte_level", folder)


class Worker:
    """A `python -m workers.server` and a stream to it."""

    def __init__(self, checkpoint: Path, folder: Path, **options: object) -> None:
        self.address = f"unix:{folder}/w.sock"
        launch = Launch(
            address=self.address,
            model_path=str(checkpoint),
            served_name="tiny",
            num_threads=1,
            kernels_dir=str(KERNELS_DIR),
            **options,  # type: ignore[arg-type]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers.server"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # a socket's path must be short
        yield Path(name)


@pytest.fixture
def worker(checkpoint: Path, folder: Path) -> Iterator[Worker]:
    running = Worker(checkpoint, folder)
    yield running
    running.end()


class Stream:
    """One gateway's stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._call = channel.stream_stream(STREAM_METHOD)(wait_for_ready=True)

    async def read(self) -> FromWorker:
        body = await asyncio.wait_for(self._call.read(), DEADLINE_S)
        assert body is not grpc.aio.EOF
        return msgspec.msgpack.decode(body, type=FromWorker)

    async def send(self, message: object) -> None:
        await self._call.write(msgspec.msgpack.encode(message))

    async def outputs(self, name: str) -> list[RequestOutput]:
        """Everything about one request, up to its end."""
        found: list[RequestOutput] = []
        while not found or found[-1].finish is None:
            message = await self.read()
            assert not isinstance(message, Hello)
            found += [output for output in message.outputs if output.request_id == name]
        return found

    async def state(self) -> EngineState:
        body = await self._channel.unary_unary(STATE_METHOD)(b"", timeout=DEADLINE_S)
        return msgspec.msgpack.decode(body, type=EngineState)

    def cancel(self) -> None:
        self._call.cancel()


@contextlib.asynccontextmanager
async def connect(worker: Worker) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stream = Stream(channel)
        hello = await stream.read()
        assert isinstance(hello, Hello)
        assert (hello.served_name, hello.vocab_size, hello.num_experts) == ("tiny", 500, 8)
        yield stream


def submit(name: str, max_tokens: int = 6, **sampling: object) -> Submit:
    return Submit(
        request_id=name,
        prompt_ids=(10, 20, 30, 40),
        sampling=Sampling(seed=5, **sampling),  # type: ignore[arg-type]
        stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
    )


def test_a_request_streams_and_others_are_refused_alone(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            await stream.send(submit("good", 6))
            await stream.send(submit("too long", 4000))
            await stream.send(submit("not a number", temperature=float("nan")))
            bad = Grammar(kind="json_schema", source='{"type": "no such type"}')
            await stream.send(submit("bad grammar", grammar=bad))
            ends: dict[str, tuple[str, str | None]] = {}
            tokens: list[int] = []
            while len(ends) < 4:
                message = await stream.read()
                assert not isinstance(message, Hello)
                for output in message.outputs:
                    if output.request_id == "good":
                        assert output.index == len(tokens)
                        tokens += output.token_ids
                    if output.finish is not None:
                        ends[output.request_id] = (output.finish.reason, output.finish.error_code)
            assert ends == {
                "good": ("length", None),
                "too long": ("error", "context_length_exceeded"),
                "not a number": ("error", "invalid_value"),
                "bad grammar": ("error", "invalid_grammar"),
            }
            assert len(tokens) == 6
            assert (await stream.state()).generated_tokens == 6

    asyncio.run(run())


def test_a_gateway_that_goes_away_frees_its_pages(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker) as watcher:
            async with connect(worker) as stream:
                await stream.send(submit("x", 2000))
                await stream.read()
                stream.cancel()
            async with asyncio.timeout(DEADLINE_S):
                while (state := await watcher.state()).num_running or state.pages_free < state.pages_total:
                    await asyncio.sleep(0.01)
            assert state.generated_tokens < 2000

    asyncio.run(run())


def test_abort_ends_one_of_two(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            await stream.send(submit("x", 1900))
            await stream.send(submit("y", 30))
            await stream.send(Abort(request_id="x"))
            assert (await stream.outputs("y"))[-1].finish.reason == "length"  # type: ignore[union-attr]
            assert (await stream.state()).num_running == 0

    asyncio.run(run())


def test_a_message_of_another_protocol_closes_its_stream_alone(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker) as good:
            async with grpc.aio.insecure_channel(worker.address) as channel:
                call = channel.stream_stream(STREAM_METHOD)()
                await call.read()
                await call.write(b"\xc1 no msgpack")
                assert await asyncio.wait_for(call.read(), DEADLINE_S) is grpc.aio.EOF
            await good.send(submit("x"))
            assert (await good.outputs("x"))[-1].finish.reason == "length"  # type: ignore[union-attr]

    asyncio.run(run())


def test_sigterm_lets_what_runs_finish_and_exits_with_zero(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            await stream.send(submit("x", 300))
            await stream.read()
            worker.process.send_signal(signal.SIGTERM)
            await stream.send(submit("late"))
            outputs = await stream.outputs("late")
            assert outputs[-1].finish.error_code == "draining"  # type: ignore[union-attr]
            assert (await stream.outputs("x"))[-1].finish.reason == "length"  # type: ignore[union-attr]

    asyncio.run(run())
    assert worker.process.wait(DEADLINE_S) == 0


def test_the_end_of_standard_input_ends_the_worker(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker):
            assert worker.process.stdin is not None
            worker.process.stdin.close()
            await asyncio.to_thread(worker.process.wait, DEADLINE_S)

    asyncio.run(run())
    worker.process.stdin = None  # closed: `communicate` must not flush it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:7"}, "cuda:7"),
        ({"max_model_len": 100_000}, "max_model_len 100000 is over the checkpoint's 2048"),
        ({"kv_cache_bytes": 1 << 16}, "lower --max-model-len"),
        ({"model_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    checkpoint: Path, folder: Path, options: dict[str, object], message: str
) -> None:
    path = Path(str(options.pop("model_path", checkpoint)))
    worker = Worker(path, folder, **options)
    assert worker.process.stderr is not None
    errors = worker.process.stderr.read()
    lines = [line for line in errors.decode().splitlines() if line.startswith("error: ")]
    code = worker.process.wait(DEADLINE_S)
    worker.end()
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in errors.decode()


def test_an_abort_while_the_grammar_compiles_is_the_requests_end(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            slow = Grammar(kind="json_schema", source='{"type": "integer", "multipleOf": 99999989}')
            await stream.send(submit("x", grammar=slow))
            await stream.send(Abort(request_id="x"))
            assert (await stream.outputs("x"))[-1].finish.reason == "abort"  # type: ignore[union-attr]
            await stream.send(submit("x"))  # its id is free again
            assert (await stream.outputs("x"))[-1].finish.reason == "length"  # type: ignore[union-attr]

    asyncio.run(run())


def test_nobody_aborts_anothers_request(worker: Worker) -> None:
    async def run() -> None:
        async with connect(worker) as mine, connect(worker) as other:
            await mine.send(submit("x", 200))
            await mine.read()
            await other.send(Abort(request_id="x"))
            await other.send(submit("y", 2))
            await other.outputs("y")
            assert (await mine.outputs("x"))[-1].finish.reason == "length"  # type: ignore[union-attr]

    asyncio.run(run())
