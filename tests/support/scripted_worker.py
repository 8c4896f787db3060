"""A worker for tests of the gateway: in this process, over real gRPC, the streams of tokens alone, as it is told.

Every byte is a token (`byte_tokenizer`), so texts and token ids can be read off each other. One `StepOutput` a step
for all that runs, one token each, as fast as the gate lets it. A sequence that comes with tokens goes on behind them,
as in an engine: it releases no text twice, yet tells once more about the prompt.
"""

from __future__ import annotations

import asyncio
import codecs
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from cluster.protocol import (
    PROTOCOL_VERSION,
    SERVICE,
    TOKEN_KEY,
    Abort,
    Beat,
    EngineState,
    Finish,
    Hello,
    RequestOutput,
    StepOutput,
    Submit,
    TokenLogprobs,
    TopLogprob,
    ToWorker,
)

BEGIN, END = "<|endoftext|>", "<|im_end|>"
SPECIAL = (BEGIN, "<|im_start|>", END)
NUM_BYTES = 256
BEGIN_ID = NUM_BYTES
END_ID = NUM_BYTES + SPECIAL.index(END)
VOCAB_SIZE = NUM_BYTES + len(SPECIAL)
QUEUE_S, PREFILL_S = 0.25, 0.5  # what it says of each sequence
DEADLINE_S = 20.0  # of every wait in a test

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToWorker).decode


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: the id of a byte is its value, the special tokens follow; texts begin with one."""
    letters = _byte_letters()
    tokenizer = Tokenizer(BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)])
    return tokenizer


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    rest = (byte for byte in range(NUM_BYTES) if byte not in letters)
    letters |= {byte: chr(NUM_BYTES + place) for place, byte in enumerate(rest)}
    return [letters[byte] for byte in range(NUM_BYTES)]


def token_bytes(token_id: int) -> bytes:
    return bytes([token_id]) if token_id < NUM_BYTES else SPECIAL[token_id - NUM_BYTES].encode()


def text_ids(text: str) -> list[int]:
    return list(text.encode())


def hello(**changes: Any) -> Hello:
    values: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "worker_id": "worker-1",
        "served_name": "scripted",
        "max_model_len": 512,
        "vocab_size": VOCAB_SIZE,
        "checkpoint": "c0ffee",
        "dtype": "float32",
        "numerics": "invariant",
        "arithmetic": "scripted",
        "num_pages": 64,
        "page_size": 64,
        "model_type": "scripted",
        "num_parameters": 0,
        "num_experts": 0,
        "num_layers": 0,
        "token_budget": 2048,
        "max_num_seqs": 64,
    }
    return Hello(**(values | changes))


def say(text: str) -> Callable[[Submit], list[int]]:
    """A model that answers everything with `text` and ends."""
    return lambda submit: [*text_ids(text), END_ID]


@dataclass
class _Sequence:
    submit: Submit
    answer: list[int]
    sent: int = 0
    held: str = ""  # text not yet released, where there are stop strings
    has_told: bool = False  # about the prompt
    ended: Finish | None = None  # by the tokens that it came with
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def __post_init__(self) -> None:
        known = list(self.submit.output_ids)
        assert self.answer[: len(known)] == known, "the tokens that it comes with are its own"
        for _ in known:
            assert self.ended is None, "it comes with tokens behind its end"
            self.ended = self.step().finish
        self.has_told = False

    def step(self) -> RequestOutput:
        """The next token; the last one has the finish."""
        if self.ended is not None:
            return RequestOutput(request_id=self.submit.request_id, index=self.sent, finish=self.ended)
        stopping, first = self.submit.stopping, not self.has_told
        self.has_told = True
        prompt_logprobs = self._prompt_logprobs() if first else None
        cached = len(self.submit.prompt_ids) // 64 * 64 if first else 0
        base: dict[str, Any] = {
            "request_id": self.submit.request_id,
            "index": self.sent,
            "cached_tokens": cached,
            "prompt_logprobs": prompt_logprobs,
            "queue_s": QUEUE_S if first else None,
            "prefill_s": PREFILL_S if first else None,
        }
        if self.submit.pooling is not None:
            return RequestOutput(**base, embedding=embedding(self.submit), finish=Finish(reason="stop"))
        if stopping.max_tokens == 0:
            return RequestOutput(**base, finish=Finish(reason="length"))
        token_id = self.answer[self.sent] if self.sent < len(self.answer) else ord("~")
        self.sent += 1
        is_end = token_id == END_ID and not stopping.ignore_eos and self.sent > stopping.min_tokens
        hidden = token_id >= NUM_BYTES and stopping.skip_special_tokens
        self.held += "" if hidden else self.decoder.decode(token_bytes(token_id))
        finish = Finish(reason="stop") if is_end else None
        matched = next((stop for stop in stopping.stop if stop in self.held), None)
        if matched is not None:
            self.held = self.held[: self.held.index(matched) + (len(matched) if stopping.include_stop else 0)]
            finish = Finish(reason="stop", stop_reason=matched)
        elif token_id in stopping.stop_token_ids:
            finish = Finish(reason="stop", stop_reason=token_id)
        elif finish is None and self.sent >= stopping.max_tokens:
            finish = Finish(reason="length")
        text = self.held if finish is not None or not stopping.stop else ""
        self.held = self.held[len(text) :]
        num_top = self.submit.sampling.logprobs
        logprobs = [] if num_top is None else [_logprobs(token_id, num_top)]
        return RequestOutput(**base, token_ids=[token_id], text=text, logprobs=logprobs, finish=finish)

    def _prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        num_top = self.submit.sampling.prompt_logprobs
        if num_top is None:
            return None
        return [None, *(_logprobs(token_id, num_top) for token_id in self.submit.prompt_ids[1:])]


def embedding(submit: Submit) -> bytes:
    """The vector (1, number of tokens, last token, -0.5), or with 0 for the last token in a mean."""
    last = 0 if submit.pooling == "mean" else submit.prompt_ids[-1]
    return struct.pack("<4f", 1.0, len(submit.prompt_ids), last, -0.5)


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The token is the second best: `!` comes before it, then follow the ids from `a`."""
    ids = [ord("!"), token_id, *range(ord("a"), ord("a") + 20)][:num_top]
    top = [TopLogprob(token_id=i, token=token_bytes(i), logprob=-0.5 * (n + 1)) for n, i in enumerate(ids)]
    return TokenLogprobs(token_id=token_id, token=token_bytes(token_id), logprob=-1.0, rank=2, top=top)


class ScriptedWorker:
    """Serves on `address` from `start` to `kill`; the lists record what it was told over all its lives."""

    def __init__(self, address: str, answer: Callable[[Submit], list[int]] | None = None) -> None:
        self.address = address
        self.answer = answer or say("Hello, wörld! 🦀")
        self.hello = hello()
        self.state = EngineState(worker_id="worker-1", num_running=3, pages_total=64, pages_free=48, generated_tokens=7)
        self.submits: list[Submit] = []
        self.aborts: list[str] = []
        self.gate = asyncio.Event()  # tokens flow while it is set
        self.gate.set()
        self.steps_left: int | None = None  # it pauses after so many more steps; None: it does not
        self.token: str | None = None  # that each call must carry
        self.beat_s: float | None = None  # between two beats
        self.raw: Callable[[Submit], list[RequestOutput]] | None = None  # what is sent instead, as it is
        self.num_beats = 0
        self.num_streams = 0  # open ones
        self._changed = asyncio.Condition()
        self._running: dict[str, _Sequence] = {}
        self._work = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        handlers = {
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
            "State": grpc.unary_unary_rpc_method_handler(self._state),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def kill(self) -> None:
        """End at once, as a process that dies."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self._running.clear()

    async def restart(self, worker_id: str = "worker-2") -> None:
        self.hello = hello(worker_id=worker_id)
        await self.start()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something that this worker was told, or its pause, makes `condition` true."""
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(condition)

    async def wait_for_submits(self, num: int = 1) -> list[Submit]:
        await self.wait_until(lambda: len(self.submits) >= num)
        return self.submits

    async def wait_for_aborts(self, num: int = 1) -> list[str]:
        await self.wait_until(lambda: len(self.aborts) >= num)
        return self.aborts

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def _state(self, request: bytes, context: Any) -> bytes:
        await self._authenticate(context)
        return _encode(self.state)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await self._authenticate(context)
        self.num_streams += 1
        await context.write(_encode(self.hello))
        tasks = [asyncio.create_task(self._steps(context)), asyncio.create_task(self._beats(context))]
        try:
            async for raw in requests:
                await self._take(_decode(raw), context)
        finally:
            for task in tasks:
                task.cancel()
            self._running.clear()
            self.num_streams -= 1

    async def _authenticate(self, context: Any) -> None:
        given = dict(context.invocation_metadata()).get(TOKEN_KEY)
        if self.token is not None and given != f"Bearer {self.token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")

    async def _beats(self, context: Any) -> None:
        while self.beat_s is not None:
            await context.write(_encode(Beat()))
            self.num_beats += 1
            await asyncio.sleep(self.beat_s)

    async def _take(self, message: ToWorker, context: Any) -> None:
        if isinstance(message, Submit):
            self.submits.append(message)
            if self.raw is not None:
                for output in self.raw(message):
                    await context.write(_encode(StepOutput(outputs=[output])))
            else:
                self._running[message.request_id] = _Sequence(message, self.answer(message))
                self._work.set()
        elif isinstance(message, Abort):
            self._running.pop(message.request_id, None)
            self.aborts.append(message.request_id)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _steps(self, context: Any) -> None:
        while True:
            await self._work.wait()
            await self.gate.wait()
            if self.steps_left is not None:
                if not self.steps_left:
                    self.gate.clear()
                    await self._tell()
                    continue
                self.steps_left -= 1
            outputs = [sequence.step() for sequence in self._running.values()]
            for output in outputs:
                if output.finish is not None:
                    del self._running[output.request_id]
            if not self._running:
                self._work.clear()
            if outputs:
                await context.write(_encode(StepOutput(outputs=outputs)))
