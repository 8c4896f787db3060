"""The tokens of one HTTP request: the outputs of its sequences, in order, between the workers and the reply.

The workers' side calls `deliver` and `fail` and never waits; the reply's side reads. What the reader leaves lying is
bounded: a generation over the bound is aborted, its reader gets what is there and then the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from msgspec.structs import replace

from cluster.errors import EngineError, ForetokenError, GrammarError, OverloadedError, UnavailableError, by_code
from cluster.gateway.disconnect import ClientDisconnected
from cluster.protocol import Finish, RequestOutput, Submit


class Observer(Protocol):
    """Is told what each sequence of a generation does (see `cluster.metrics`)."""

    def began(self, choice: int, queue_s: float, prefill_s: float) -> None:
        """Its first output is here: what its worker says of it."""

    def tokens(self, choice: int, num_tokens: int) -> None: ...

    def finished(self, choice: int, reason: str) -> None: ...

    def aborted(self, choice: int, reason: str) -> None:
        """It ends without `finished`."""


class Unobserved:
    """An `Observer` that does nothing but what a subclass does."""

    def began(self, choice: int, queue_s: float, prefill_s: float) -> None: ...

    def tokens(self, choice: int, num_tokens: int) -> None: ...

    def finished(self, choice: int, reason: str) -> None: ...

    def aborted(self, choice: int, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Observers:
    """Several as one."""

    all: tuple[Observer, ...]

    def began(self, choice: int, queue_s: float, prefill_s: float) -> None:
        for observer in self.all:
            observer.began(choice, queue_s, prefill_s)

    def tokens(self, choice: int, num_tokens: int) -> None:
        for observer in self.all:
            observer.tokens(choice, num_tokens)

    def finished(self, choice: int, reason: str) -> None:
        for observer in self.all:
            observer.finished(choice, reason)

    def aborted(self, choice: int, reason: str) -> None:
        for observer in self.all:
            observer.aborted(choice, reason)


@dataclass(slots=True, eq=False)
class Sample:
    """One sequence of a request, and what of it the reply has: enough to go on with it on any worker."""

    choice: int
    submit: Submit  # as it was first asked for
    deadline: float  # on the event loop's clock
    output_ids: list[int] = field(default_factory=list)
    has_begun: bool = False  # its first output, which carries what concerns the prompt, was taken

    def take(self, output: RequestOutput) -> RequestOutput | None:
        """What of an output is new; None for a duplicate. Raises `EngineError` where tokens are missing."""
        finish = output.finish
        if finish is not None and finish.reason in ("error", "abort"):
            return output  # a worker that refuses to go on with it knows no index
        expected, end = len(self.output_ids), output.index + len(output.token_ids)
        if output.index > expected:
            raise EngineError(f"tokens {expected} to {output.index - 1} were lost")
        if output.index < expected:
            if end > expected:
                raise EngineError(f"token {expected} came again in part, from {output.index}")
            if finish is None:
                return None
            if end < expected:
                raise EngineError(f"the end came behind token {end - 1}, but {expected} tokens were there")
            return RequestOutput(request_id=output.request_id, index=expected, finish=finish)
        self.output_ids += output.token_ids
        if self.has_begun and (output.cached_tokens or output.queue_s is not None or output.prompt_logprobs):
            # of the worker that went on with it
            output = replace(output, cached_tokens=0, prompt_logprobs=None, queue_s=None, prefill_s=None)
        self.has_begun = True
        return output

    def remaining(self, now: float) -> Submit:
        """What a worker must do from here on; the same draws follow, as they depend on seed and position alone."""
        submit = replace(self.submit, deadline_s=max(0.0, self.deadline - now))
        if not self.has_begun:
            return submit
        sampling = replace(submit.sampling, prompt_logprobs=None)
        return replace(submit, output_ids=tuple(self.output_ids), sampling=sampling)


class Generation:
    """`read` gives `(choice, output)` in each choice's order, then nothing more, or raises what ended it early.

    As a context manager it aborts on leaving what still runs.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        send_abort: Callable[[Sample], None],
        observer: Observer,
        max_buffered: int,
    ) -> None:
        self._open = dict.fromkeys(samples)  # in their order
        self._send_abort = send_abort
        self._observer = observer
        self._max_buffered = max_buffered
        self._buffer: list[tuple[int, RequestOutput]] = []
        self.num_tokens = 0  # generated so far, over all choices
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.grammar_field = "response_format"  # of the request: what a grammar that only a worker can judge came from

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort("disconnect" if kind is ClientDisconnected else "closed")

    def fail_after(self, timeout_s: float, error: ForetokenError) -> None:
        """End with `error` unless all is done by then."""
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, error)

    def _expire(self, error: ForetokenError) -> None:
        self.fail(error, reason="deadline")

    # ------------------------------------------------------------------------------------------ the workers' side

    def deliver(self, sample: Sample, output: RequestOutput) -> None:
        """Take an output; index i goes on once and in order, a duplicate is dropped, a hole is an error."""
        if sample not in self._open:
            return
        try:
            new = sample.take(output)
        except EngineError as error:
            self._end(error, reason="error")
            return
        if new is None:
            return
        finish = new.finish
        if finish is not None:
            del self._open[sample]
            if finish.reason in ("error", "abort"):
                self._observer.aborted(sample.choice, "error")
                self._end(_error_of(finish, self.grammar_field), reason="error")
                return
        if new.queue_s is not None and new.prefill_s is not None:
            self._observer.began(sample.choice, new.queue_s, new.prefill_s)
        if new.token_ids:
            self.num_tokens += len(new.token_ids)
            self._observer.tokens(sample.choice, len(new.token_ids))
        self._buffer.append((sample.choice, new))
        if finish is not None:
            self._observer.finished(sample.choice, finish.reason)
            if not self._open:
                self._stop_timer()
        elif len(self._buffer) > self._max_buffered:
            text = f"the reader is {self._max_buffered} outputs behind; the request was aborted"
            self._end(OverloadedError(text), reason="slow_reader")
        self._wake()

    def fail(self, error: Exception, *, reason: str) -> None:
        """End it early: the workers are told to abort, the reader gets what is buffered and then `error`.

        Without effect where all has been generated.
        """
        if self._open:
            self._end(error, reason)

    def _end(self, error: Exception, reason: str) -> None:
        self._error = error
        for sample in self._open:
            self._observer.aborted(sample.choice, reason)
            self._send_abort(sample)
        self._open.clear()
        self._stop_timer()
        self._wake()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # -------------------------------------------------------------------------------------------- the reply's side

    def abort(self, reason: str) -> None:
        """Nobody reads on."""
        self.fail(ClientDisconnected(), reason=reason)

    async def read(self) -> list[tuple[int, RequestOutput]]:
        """All outputs since the last call, at least one; empty when every choice has finished and was read."""
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        outputs, self._buffer = self._buffer, []
        return outputs


def _error_of(finish: Finish, grammar_field: str) -> ForetokenError:
    if finish.reason == "abort":
        return UnavailableError("the worker aborted the request; send it again")
    kind = by_code(finish.error_code or "")
    param = grammar_field if kind is GrammarError else None
    return kind(finish.error_message or "the worker gave no reason", param=param)
