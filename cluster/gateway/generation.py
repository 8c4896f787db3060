"""The tokens of one HTTP request: the outputs of its sequences, in order, between a worker and the reply.

The worker's side calls `deliver` and `fail` and never waits; the reply's side reads. What the reader leaves lying is
bounded: a generation over the bound is aborted, its reader gets what is there and then the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from cluster.errors import EngineError, ForetokenError, GrammarError, OverloadedError, UnavailableError, by_code
from cluster.gateway.disconnect import ClientDisconnected
from cluster.protocol import Finish, RequestOutput


class Observer(Protocol):
    """Counts and times what a generation does (see `cluster.metrics`)."""

    def tokens(self, choice: int, num_tokens: int) -> None: ...

    def finished(self, choice: int, reason: str) -> None: ...

    def aborted(self, reason: str) -> None: ...


@dataclass(slots=True)
class _Sequence:
    choice: int
    next_index: int = 0


class Generation:
    """`read` gives `(choice, output)` in each choice's order, then nothing more, or raises what ended it early.

    As a context manager it aborts on leaving what still runs.
    """

    def __init__(
        self,
        request_ids: Sequence[str],
        *,
        send_abort: Callable[[str], None],
        observer: Observer,
        max_buffered: int,
    ) -> None:
        self._open = {request_id: _Sequence(choice) for choice, request_id in enumerate(request_ids)}
        self._send_abort = send_abort
        self._observer = observer
        self._max_buffered = max_buffered
        self._buffer: list[tuple[int, RequestOutput]] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

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

    # ------------------------------------------------------------------------------------------- the worker's side

    def deliver(self, output: RequestOutput) -> None:
        """Take an output; index i goes on once and in order, a duplicate is dropped, a hole is an error."""
        sequence = self._open.get(output.request_id)
        if sequence is None:
            return
        num_tokens, expected = len(output.token_ids), sequence.next_index
        if output.index < expected:
            if output.index + num_tokens > expected:
                self._end(EngineError(f"token {expected} came again in part, from {output.index}"), reason="error")
            return
        if output.index > expected:
            self._end(EngineError(f"tokens {expected} to {output.index - 1} were lost"), reason="error")
            return
        finish = output.finish
        if finish is not None:
            del self._open[output.request_id]
            if finish.reason in ("error", "abort"):
                self._end(_error_of(finish), reason="error")
                return
        sequence.next_index += num_tokens
        if num_tokens:
            self._observer.tokens(sequence.choice, num_tokens)
        self._buffer.append((sequence.choice, output))
        if finish is not None:
            self._observer.finished(sequence.choice, finish.reason)
            if not self._open:
                self._stop_timer()
        elif len(self._buffer) > self._max_buffered:
            text = f"the reader is {self._max_buffered} outputs behind; the request was aborted"
            self._end(OverloadedError(text), reason="slow_reader")
        self._wake()

    def fail(self, error: Exception, *, reason: str) -> None:
        """End it early: the worker is told to abort, the reader gets what is buffered and then `error`.

        Without effect where all has been generated.
        """
        if self._open:
            self._end(error, reason)

    def _end(self, error: Exception, reason: str) -> None:
        self._error = error
        self._observer.aborted(reason)
        for request_id in self._open:
            self._send_abort(request_id)
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


def _error_of(finish: Finish) -> ForetokenError:
    if finish.reason == "abort":
        return UnavailableError("the worker aborted the request; send it again")
    kind = by_code(finish.error_code or "")
    param = "response_format" if kind is GrammarError else None  # the one field that only a worker can judge
    return kind(finish.error_message or "the worker gave no reason", param=param)
