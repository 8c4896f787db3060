"""`python -m workers.server`: serves one engine over gRPC. Holds no decisions.

Its options are one `Launch` message, JSON, on the first line of standard input. It answers `State` once the model is
loaded; SIGTERM lets what runs finish, a second signal or the end of standard input (the parent is gone) ends it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator

import grpc
import msgspec

from cluster.errors import EngineError, ForetokenError
from cluster.protocol import (
    PROTOCOL_VERSION,
    SERVICE,
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
from workers.build import BuiltEngine, build_engine
from workers.console import loading_progress, set_up_logging
from workers.runner import EngineRunner, refusal
from workers.sampling.guided import CompiledGrammar, GrammarCompiler

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
MAX_QUEUED_MESSAGES = 16_384  # to one gateway; each is a step's
# The event loop and the engine share an interpreter: a waiting engine thread must not wait the default 5 ms for it.
SWITCH_INTERVAL_S = 0.0005

_encode = msgspec.msgpack.Encoder().encode
_decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode


class _Stream:
    """One gateway's open stream: its requests and what is on the way to it."""

    def __init__(self) -> None:
        self.request_ids: set[str] = set()
        self.compiling: dict[str, asyncio.Task[None]] = {}
        self._outputs: asyncio.Queue[FromWorker | None] = asyncio.Queue()

    def put(self, message: FromWorker) -> None:
        """Queue a message; a gateway that has stopped reading is cut off rather than waited for."""
        if self._outputs.qsize() < MAX_QUEUED_MESSAGES:
            self._outputs.put_nowait(message)
        elif self._outputs.qsize() == MAX_QUEUED_MESSAGES:
            log.error("a stream is closed: its gateway reads nothing, %d messages wait for it", MAX_QUEUED_MESSAGES)
            self.end()

    def end(self) -> None:
        self._outputs.put_nowait(None)

    async def get(self) -> FromWorker | None:
        """The next message; None at the end."""
        return await self._outputs.get()


class WorkerService:
    """Carries messages between streams and the engine's thread. Lives on the event loop."""

    def __init__(self, built: BuiltEngine, hello: Hello) -> None:
        self.hello = hello
        self._engine = built.engine
        self._compiler = GrammarCompiler(built.engine.tokenizer, built.engine.eos_token_ids)
        self._loop = asyncio.get_running_loop()
        self.runner = EngineRunner(built.engine, self._publish)
        self._owners: dict[str, _Stream] = {}

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
            stream.put(StepOutput(outputs=outputs))

    async def stream(self, messages: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        """The bidirectional stream: `Hello`, then a `StepOutput` for each step that concerns this gateway."""
        stream = _Stream()
        reader = asyncio.create_task(self._read(stream, messages))
        try:
            yield _encode(self.hello)
            while (message := await stream.get()) is not None:
                yield _encode(message)
        finally:
            reader.cancel()
            self._close(stream)

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
        if submit.sampling.grammar is None:
            self._start(submit, None)
            return
        task = asyncio.create_task(self._compile_and_start(submit, submit.sampling.grammar))
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

    async def _compile_and_start(self, submit: Submit, grammar: Grammar) -> None:
        try:
            compiled = await asyncio.wrap_future(self._compiler.submit(grammar))
        except Exception as error:
            self._refuse(submit, error)
            return
        self._start(submit, compiled)

    def _start(self, submit: Submit, compiled: CompiledGrammar | None) -> None:
        try:
            matcher = compiled.matcher() if compiled is not None else None
            self.runner.submit(self._engine.request_from(submit, matcher))
        except Exception as error:
            self._refuse(submit, error)

    def _refuse(self, submit: Submit, error: Exception) -> None:
        """End one request, whatever was wrong with it, and nothing else on its stream."""
        if not isinstance(error, ForetokenError):
            log.error("request %s could not be started", submit.request_id, exc_info=error)
            error = EngineError(f"the request could not be started: {type(error).__name__}")
        self._dispatch(refusal(submit.request_id, error))

    def _close(self, stream: _Stream) -> None:
        """A gateway is gone: whatever it had running is of no use to anybody."""
        for task in list(stream.compiling.values()):
            task.cancel()
        for request_id in stream.request_ids:
            self._owners.pop(request_id, None)
            self.runner.abort(request_id)
        stream.request_ids.clear()

    def close(self) -> None:
        """End the processes that check grammars."""
        self._compiler.close()

    async def state(self, _request: bytes, _context: object) -> EngineState:
        return msgspec.structs.replace(self.runner.snapshot(), worker_id=self.hello.worker_id)


def _handlers(service: WorkerService) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Stream": grpc.stream_stream_rpc_method_handler(service.stream),
            "State": grpc.unary_unary_rpc_method_handler(service.state, response_serializer=_encode),
        },
    )


def make_hello(launch: Launch, built: BuiltEngine) -> Hello:
    engine, spec = built.engine, built.engine.decoder.spec
    return Hello(
        version=PROTOCOL_VERSION,
        worker_id=uuid.uuid4().hex,
        served_name=launch.served_name,
        max_model_len=engine.options.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        numerics=engine.decoder.numerics.name,
        num_pages=engine.options.num_pages,
        page_size=engine.options.page_size,
        model_type=spec.family,
        num_parameters=built.num_parameters,
        num_experts=spec.moe.num_experts if spec.moe is not None else 0,
        num_layers=len(spec.layers),
    )


async def serve(launch: Launch, built: BuiltEngine) -> None:
    """Serve until SIGTERM or SIGINT, then let what runs finish for `drain_timeout_s`; a second signal ends at once."""
    service = WorkerService(built, make_hello(launch, built))
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((_handlers(service),))
    server.add_insecure_port(launch.address)
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: now.set() if stop.is_set() else stop.set())
    service.runner.start()
    await server.start()
    await stop.wait()
    service.runner.drain()
    deadline = loop.time() + launch.drain_timeout_s
    while not service.runner.idle and not now.is_set() and loop.time() < deadline:
        await asyncio.sleep(0.02)
    await server.stop(grace=0.2)
    await asyncio.to_thread(service.runner.stop, 2.0)
    service.close()


def _watch_parent() -> None:
    """End the process when standard input ends: whoever started it is gone, and nobody else would."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> None:
    line = _read_line()
    launch = msgspec.json.decode(line, type=Launch)
    set_up_logging(launch.log_level, launch.log_format)
    if launch.exit_with_parent:
        _watch_parent()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        built = build_engine(launch, loading_progress(launch))
    except ForetokenError as error:
        # One line that the launcher shows as it is; a traceback would hide what the user can do.
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    asyncio.run(serve(launch, built))


def _read_line() -> bytes:
    """The first line of standard input, read unbuffered: what follows belongs to whoever watches the pipe."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


if __name__ == "__main__":
    main()
