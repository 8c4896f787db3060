"""The worker process as the launcher and the gateway meet it."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cluster.protocol import STREAM_METHOD, Abort, Beat, Grammar
from tests.support.checkpoints import Recipe, make_model, save
from tests.support.tokenizers_ import build
from tests.support.worker_process import DEADLINE_S, RunningWorker, connect, submit

pytestmark = pytest.mark.needs("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    recipe = Recipe("qwen3_moe", {"vocab_size": 500, "eos_token_id": 3, "max_position_embeddings": 2048})
    save(make_model(recipe), folder)
    return build("byte_level", folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # a socket's path must be short
        yield Path(name)


@pytest.fixture(scope="module")
def worker(checkpoint: Path) -> Iterator[RunningWorker]:
    """For tests that leave it as it is."""
    with tempfile.TemporaryDirectory() as name, RunningWorker(checkpoint, Path(name)) as running:
        yield running


@pytest.fixture
def own_worker(checkpoint: Path, folder: Path) -> Iterator[RunningWorker]:
    with RunningWorker(checkpoint, folder) as running:
        yield running


def test_a_request_streams_and_others_are_refused_alone(worker: RunningWorker) -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            before = (await stream.state()).generated_tokens
            await stream.send(submit("good", 6))
            await stream.send(submit("too long", 4000))
            await stream.send(submit("not a number", temperature=float("nan")))
            bad = Grammar(kind="json_schema", source='{"type": "no such type"}')
            await stream.send(submit("bad grammar", grammar=bad))
            ends: dict[str, tuple[str, str | None]] = {}
            tokens: list[int] = []
            while len(ends) < 4:
                for output in (await stream.step()).outputs:
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
            assert (await stream.state()).generated_tokens == before + 6

    asyncio.run(run())


def test_a_gateway_that_goes_away_frees_its_pages(worker: RunningWorker) -> None:
    async def run() -> None:
        async with connect(worker) as watcher:
            async with connect(worker) as stream:
                before = (await stream.state()).generated_tokens
                await stream.send(submit("x", 2000))
                await stream.step()
                stream.cancel()
            async with asyncio.timeout(DEADLINE_S):
                while (state := await watcher.state()).num_running or state.pages_free < state.pages_total:
                    await asyncio.sleep(0.01)
            assert state.generated_tokens < before + 2000

    asyncio.run(run())


def test_abort_ends_one_of_two(worker: RunningWorker) -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            await stream.send(submit("x", 1900))
            await stream.send(submit("y", 30))
            await stream.send(Abort(request_id="x"))
            assert (await stream.outputs("y"))[-1].finish.reason == "length"  # type: ignore[union-attr]
            assert (await stream.state()).num_running == 0

    asyncio.run(run())


def test_a_message_of_another_protocol_closes_its_stream_alone(worker: RunningWorker) -> None:
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


def test_sigterm_lets_what_runs_finish_and_exits_with_zero(own_worker: RunningWorker) -> None:
    async def run() -> None:
        async with connect(own_worker) as stream:
            await stream.send(submit("x", 300))
            await stream.step()
            own_worker.process.send_signal(signal.SIGTERM)
            await stream.send(submit("late"))
            outputs = await stream.outputs("late")
            assert outputs[-1].finish.error_code == "draining"  # type: ignore[union-attr]
            assert (await stream.outputs("x"))[-1].finish.reason == "length"  # type: ignore[union-attr]

    asyncio.run(run())
    assert own_worker.process.wait(DEADLINE_S) == 0


def test_the_end_of_standard_input_ends_the_worker(own_worker: RunningWorker) -> None:
    async def run() -> None:
        async with connect(own_worker):
            own_worker.close_stdin()
            assert await asyncio.to_thread(own_worker.process.wait, DEADLINE_S) == 0

    asyncio.run(run())


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
    worker = RunningWorker(path, folder, **options)
    assert worker.process.stderr is not None
    errors = worker.process.stderr.read()
    lines = [line for line in errors.decode().splitlines() if line.startswith("error: ")]
    code = worker.process.wait(DEADLINE_S)
    worker.end()
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in errors.decode()


def test_a_silent_stream_says_that_its_worker_lives(checkpoint: Path, folder: Path) -> None:
    async def run() -> None:
        with RunningWorker(checkpoint, folder, heartbeat_s=0.05) as worker:
            async with connect(worker) as idle, connect(worker) as busy:
                began = asyncio.get_running_loop().time()
                await busy.send(submit("x", 400))
                ended, num_steps, num_beats = False, 0, 0
                while not ended:
                    message = await busy.read()
                    if isinstance(message, Beat):
                        num_beats += 1
                    else:
                        num_steps += 1
                        ended = message.outputs[-1].finish is not None  # type: ignore[union-attr]
                for _ in range(5):
                    assert isinstance(await idle.read(), Beat)
                passed_s = asyncio.get_running_loop().time() - began
                assert num_steps == 400
                assert num_beats <= passed_s / 0.05  # never more often than said

    asyncio.run(run())


def test_an_abort_while_the_grammar_compiles_is_the_requests_end(worker: RunningWorker) -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            slow = Grammar(kind="json_schema", source='{"type": "integer", "multipleOf": 99999989}')
            await stream.send(submit("x", grammar=slow))
            await stream.send(Abort(request_id="x"))
            assert (await stream.outputs("x"))[-1].finish.reason == "abort"  # type: ignore[union-attr]
            await stream.send(submit("x"))  # its id is free again
            assert (await stream.outputs("x"))[-1].finish.reason == "length"  # type: ignore[union-attr]

    asyncio.run(run())


def test_nobody_aborts_anothers_request(worker: RunningWorker) -> None:
    async def run() -> None:
        async with connect(worker) as mine, connect(worker) as other:
            await mine.send(submit("x", 200))
            await mine.step()
            await other.send(Abort(request_id="x"))
            await other.send(submit("y", 2))
            await other.outputs("y")
            assert (await mine.outputs("x"))[-1].finish.reason == "length"  # type: ignore[union-attr]

    asyncio.run(run())
