"""The gateways' streams: `Submit` and `Abort` in, `Hello`, `StepOutput` and `Beat` out. Holds no decisions."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import msgspec

from cluster.errors import EngineError, ForetokenError
from cluster.protocol import (
    PROTOCOL_VERSION,
    Beat,
    EngineState,
    Finish,
    FromWorker,
    Grammar,
    Hello,
    Launch,
    RequestOutput,
    StepOutput,
    Submit,
    ToWorker,
)
from workers.build import BuiltEngine
from workers.runner import EngineRunner, refusal
from workers.sampling.guided import CompiledGrammar, GrammarCompiler

log = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 16_384  # to one gateway; each is a step's
STATE_S = 0.1  # between two states on one stream
STOP_S = 2.0  # for the step that runs when the worker ends

_encode = msgspec.msgpack.Encoder().encode
_decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode


class _Stream:
    """One gateway's open stream: its requests and what is on the way to it."""

    def __init__(self, beat_s: float, state: Callable[[], EngineState]) -> None:
        """After `beat_s` without a message it says that the worker lives. `state`: the engine's now."""
        self.request_ids: set[str] = set()
        self.compiling: dict[str, asyncio.Task[None]] = {}
        self._outputs: asyncio.Queue[FromWorker | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._beat_s = beat_s
        self._state = state
        self._told: EngineState | None = None  # and when:
        self._told_s = float("-inf")
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(beat_s, self._beat)

    def put(self, message: FromWorker) -> None:
        """Queue a message; a gateway that has stopped reading is cut off rather than waited for."""
        self._last_s = self._loop.time()
        if self._outputs.qsize() < MAX_QUEUED_MESSAGES:
            self._outputs.put_nowait(message)
        elif self._outputs.qsize() == MAX_QUEUED_MESSAGES:
            log.error("a stream is closed: its gateway reads nothing, %d messages wait for it", MAX_QUEUED_MESSAGES)
            self.end()

    def _beat(self) -> None:
        """One timer at a time, however many messages there are: it looks when the last of them went."""
        silent_s = self._loop.time() - self._last_s
        if silent_s >= self._beat_s:
            silent_s = 0.0
            if self._outputs.empty():
                self.put(Beat(state=self._news()))
        self._timer = self._loop.call_later(self._beat_s - silent_s, self._beat)

    def put_outputs(self, outputs: list[RequestOutput]) -> None:
        self.put(StepOutput(outputs=outputs, state=self._news()))

    def _news(self) -> EngineState | None:
        """The engine's state where it has changed since it was told, at most once in `STATE_S`."""
        now = self._loop.time()
        if now - self._told_s < STATE_S:
            return None
        state = self._state()
        if state == self._told:
            return None
        self._told, self._told_s = state, now
        return state

    def end(self) -> None:
        self._outputs.put_nowait(None)

    async def get(self) -> FromWorker | None:
        """The next message; None at the end."""
        return await self._outputs.get()

    def close(self) -> None:
        """No more beats."""
        self._timer.cancel()


class StreamService:
    """Carries messages between gateways and the engine's thread. Lives on the event loop."""

    def __init__(self, built: BuiltEngine, launch: Launch, worker_id: str) -> None:
        self.hello = make_hello(launch, built, worker_id)
        self._engine = built.engine
        self._experts = built.experts
        self._beat_s = launch.heartbeat_s
        self._compiler = GrammarCompiler(built.engine.tokenizer, built.engine.eos_token_ids)
        self._loop = asyncio.get_running_loop()
        self.runner = EngineRunner(
            built.engine,
            self._publish,
            can_step=lambda: self._experts is None or self._experts.ready,
            reroute_timeout_s=launch.reroute_timeout_s,
            turns=built.turns,
        )
        self._owners: dict[str, _Stream] = {}
        self._streams: set[_Stream] = set()

    def handlers(self) -> Mapping[str, Any]:
        return {"Stream": grpc.stream_stream_rpc_method_handler(self.stream)}

    def start(self) -> None:
        self.runner.start()

    def drain(self) -> None:
        """Take no new requests; what runs goes on."""
        self.runner.drain()

    @property
    def idle(self) -> bool:
        return self.runner.idle

    def state(self) -> EngineState:
        num_compiling = sum(len(stream.compiling) for stream in self._streams)
        snapshot = self.runner.snapshot()
        return msgspec.structs.replace(snapshot, worker_id=self.hello.worker_id, num_compiling=num_compiling)

    async def close(self) -> None:
        """End the engine's thread, the links to experts, and the processes that check grammars."""
        await asyncio.to_thread(self.runner.stop, STOP_S)
        if self._experts is not None:
            await asyncio.to_thread(self._experts.close)
        self._compiler.close()

    def _publish(self, output: StepOutput) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, output)

    def _dispatch(self, output: StepOutput) -> None:
        """Give each stream its part of a step."""
        parts: dict[int, tuple[_Stream, list[RequestOutput]]] = {}
        for item in output.outputs:
            stream = self._owners.get(item.request_id)
            if stream is None:  # its gateway has gone
                continue
            parts.setdefault(id(stream), (stream, []))[1].append(item)
            if item.finish is not None:
                del self._owners[item.request_id]
                stream.request_ids.discard(item.request_id)
        for stream, outputs in parts.values():
            stream.put_outputs(outputs)

    async def stream(self, messages: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        """The bidirectional stream: `Hello`, then a `StepOutput` for each step that concerns this gateway."""
        stream = _Stream(self._beat_s, self.state)
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(stream, messages))
        try:
            yield _encode(self.hello)
            while (message := await stream.get()) is not None:
                yield _encode(message)
        finally:
            reader.cancel()
            self._close_stream(stream)

    async def _read(self, stream: _Stream, messages: AsyncIterator[bytes]) -> None:
        try:
            async for body in messages:
                self._take(stream, _decode_to_worker(body))
        except msgspec.DecodeError as error:
            log.error("a stream is closed: it sent a message that is none of the protocol's: %s", error)
        finally:
            stream.end()

    def _take(self, stream: _Stream, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._submit(stream, message)
        elif self._owners.get(message.request_id) is stream:  # nobody ends another gateway's requests
            self._abort(stream, message.request_id)

    def _submit(self, stream: _Stream, submit: Submit) -> None:
        if submit.request_id in self._owners:
            stream.put(refusal(submit.request_id, ForetokenError(f"request id {submit.request_id!r} is taken")))
            return
        self._owners[submit.request_id] = stream
        stream.request_ids.add(submit.request_id)
        log.debug("request %.100r came, trace %.100r", submit.request_id, submit.traceparent)
        arrival = time.monotonic()
        if submit.sampling.grammar is None:
            self._start(submit, None, arrival)
            return
        task = asyncio.create_task(self._compile_and_start(submit, submit.sampling.grammar, arrival))
        stream.compiling[submit.request_id] = task
        task.add_done_callback(lambda _: stream.compiling.pop(submit.request_id, None))

    def _abort(self, stream: _Stream, request_id: str) -> None:
        task = stream.compiling.pop(request_id, None)
        if task is None:
            self.runner.abort(request_id)
            return
        task.cancel()  # the engine has not heard of it: its terminal event is ours to send
        output = RequestOutput(request_id=request_id, index=0, finish=Finish(reason="abort"))
        self._dispatch(StepOutput(outputs=[output]))

    async def _compile_and_start(self, submit: Submit, grammar: Grammar, arrival: float) -> None:
        try:
            compiled = await asyncio.wrap_future(self._compiler.submit(grammar))
        except Exception as error:
            self._refuse(submit, error)
            return
        self._start(submit, compiled, arrival)

    def _start(self, submit: Submit, compiled: CompiledGrammar | None, arrival: float) -> None:
        try:
            request = self._engine.request_from(submit, compiled.matcher() if compiled is not None else None)
            request.arrival = arrival  # its grammar's compilation is a part of its wait
            self.runner.submit(request)
        except Exception as error:
            self._refuse(submit, error)

    def _refuse(self, submit: Submit, error: Exception) -> None:
        """End one request, whatever was wrong with it, and nothing else on its stream."""
        if not isinstance(error, ForetokenError):
            log.error("request %s could not be started", submit.request_id, exc_info=error)
            error = EngineError(f"the request could not be started: {type(error).__name__}")
        self._dispatch(refusal(submit.request_id, error))

    def _close_stream(self, stream: _Stream) -> None:
        """A gateway is gone: whatever it had running is of no use to anybody."""
        stream.close()
        self._streams.discard(stream)
        for task in list(stream.compiling.values()):
            task.cancel()
        for request_id in stream.request_ids:
            self._owners.pop(request_id, None)
            self.runner.abort(request_id)
        stream.request_ids.clear()


def make_hello(launch: Launch, built: BuiltEngine, worker_id: str) -> Hello:
    engine, spec = built.engine, built.engine.decoder.spec
    return Hello(
        version=PROTOCOL_VERSION,
        worker_id=worker_id,
        served_name=launch.served_name,
        max_model_len=engine.options.max_model_len,
        vocab_size=spec.vocab_size,
        **msgspec.structs.asdict(built.likeness),
        num_pages=engine.options.num_pages,
        page_size=engine.options.page_size,
        model_type=spec.family,
        num_parameters=built.num_parameters,
        num_experts=spec.moe.num_experts if spec.moe is not None else 0,
        num_layers=len(spec.layers),
        token_budget=engine.options.scheduler.token_budget,
        max_num_seqs=engine.options.scheduler.max_num_seqs,
        prefix_cache=engine.options.prefix_cache,
        startup_s=process_age_s(),
    )


def process_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not tell. `man 5 proc`, stat."""
    try:
        after_name = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
