"""Structured output: grammars that a sequence must follow, by llguidance.

A grammar comes from a request, so its text is hostile until shown otherwise: a few kilobytes can ask for hours, for all
memory, or for a recursion that overruns the stack and takes the process with it, and a thread that compiles cannot be
interrupted. So each new grammar is first compiled and tried in a checker process (`grammar_check.py`) that ends when it
is late; only one that came through is compiled here. Quick grammars never wait for slow ones: what is not done in
`QUICK_S` moves to a lane of its own. JSON is compact: no white space between its tokens.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import llguidance
import numpy as np
from numpy.typing import NDArray

from cluster.errors import DrainingError, EngineError, ForetokenError, GrammarError, OverloadedError
from cluster.protocol import Grammar
from workers.models.tokenizer import Tokenizer
from workers.sampling.grammar_source import refused, shorten, source_of

QUICK_S = 0.25  # of processor time
WAIT_FACTOR = 8  # how much longer than its processor time a check may take on a busy machine
START_S = 30.0  # for a checker to be ready
MAX_CHECK_BYTES = 512 * 2**20  # of memory a grammar may need
NUM_QUICK = 2  # grammars that are compiled at the same time
MAX_QUICK = 64  # grammars that wait for that
MAX_SLOW = 3

# step limits bound one mask (some 10 ms); the states of a lexer take 1-2 kB each
LIMITS = {"max_lexer_states": 20_000, "step_lexer_fuel": 100_000, "step_max_items": 50_000}
_CHECKER = Path(__file__).with_name("grammar_check.py")


class Matcher:
    """One sequence's place in its grammar. Every method belongs to the engine's thread.

    A token that the grammar refuses, or a state that costs more than the limits, leaves it in `error` for good: from
    then on its mask allows nothing.
    """

    def __init__(self, compiled: CompiledGrammar, state: llguidance.LLMatcher) -> None:
        self._compiled = compiled
        self._state = state

    @property
    def is_active(self) -> bool:
        """Whether the next token is constrained at all: from the first to the last."""
        return True

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the next token's mask into `row` [words] int32, bit i of word i // 32 for token i; 1 = allowed.

        EOS is allowed only where the text is complete. Ids beyond the tokenizer's vocabulary are masked off.
        """
        words = self._compiled.num_mask_words
        target = row[:words] if len(row) >= words else np.empty(words, dtype=np.int32)
        self._state.unsafe_compute_mask_ptr(target.ctypes.data, words * 4)
        if self._state.is_error():
            row[:] = 0
        elif len(row) >= words:
            row[words:] = 0
        else:
            row[:] = target[: len(row)]

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False where the grammar refuses it."""
        return bool(self._state.consume_token(token_id))

    def restarted(self) -> Matcher:
        """A new matcher of the same grammar, before its first token."""
        return self._compiled.matcher()

    @property
    def is_stopped(self) -> bool:
        """Whether the text is complete and nothing but EOS can follow."""
        return bool(self._state.is_stopped()) and not self._state.is_error()

    @property
    def error(self) -> str:
        """What went wrong, empty where nothing did."""
        return shorten(self._state.get_error()) if self._state.is_error() else ""


class CompiledGrammar:
    """A grammar ready for one tokenizer; sequences take their own `matcher` from it."""

    def __init__(self, state: llguidance.LLMatcher, vocab_size: int) -> None:
        self._state = state
        self._lock = threading.Lock()
        self.num_mask_words = (vocab_size + 31) // 32

    def matcher(self) -> Matcher:
        """A matcher before its first token; any thread may call."""
        with self._lock:
            return Matcher(self, self._state.deep_copy())


class _LateError(Exception):
    """A check did not end in its time."""


class _Checker:
    """A checker process, started when it is first needed and again after it was killed. Used by one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: str, limit_s: float) -> str | None:
        """What is wrong with a grammar, or None. Raises `_LateError` past `limit_s` of processor time."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"grammar": grammar, "limits": LIMITS, "cpu_s": limit_s}
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = _read_line(process.stdout, limit_s * WAIT_FACTOR)
        except OSError:
            answer = b""
        except _LateError:
            self.close()
            raise
        if not answer:
            self.close()
            if process.returncode == -signal.SIGPROF:
                raise _LateError
            return "it needs too much memory, or nests too deeply"
        error: str | None = json.loads(answer)["error"]
        return error

    def close(self) -> None:
        """Kill the process, if one runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # one that is ending already keeps the status that it ends with
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHECKER), str(MAX_CHECK_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is not for it: it ends with its input
        )
        assert self._process.stdout is not None
        try:
            ready = _read_line(self._process.stdout, START_S)
        except _LateError:
            ready = b""
        if not ready:
            self.close()
            raise EngineError("the process that checks grammars did not start")
        return self._process


class _Lane:
    """Threads with a checker each, for compilations of up to `limit_s` seconds; at most `max_waiting` at once."""

    def __init__(self, num_threads: int, limit_s: float, max_waiting: int) -> None:
        self.limit_s = limit_s
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="grammar")
        self._places = threading.Semaphore(max_waiting)
        self._local = threading.local()
        self._checkers: list[_Checker] = []

    def start(self, task: Callable[[], None]) -> None:
        """Run `task` on one of the threads. Raises `OverloadedError` where too many wait."""
        if not self._places.acquire(blocking=False):
            raise OverloadedError("too many grammars wait to be compiled: try again later", retry_after_s=self.limit_s)
        try:
            running = self._executor.submit(task)
        except RuntimeError as error:
            raise DrainingError("the server is shutting down") from error
        running.add_done_callback(lambda _: self._places.release())

    def checker(self) -> _Checker:
        """The calling thread's own."""
        if not hasattr(self._local, "checker"):
            self._local.checker = _Checker()
            self._checkers.append(self._local.checker)
        checker: _Checker = self._local.checker
        return checker

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        for checker in self._checkers:
            checker.close()


class GrammarCompiler:
    """Compiles grammars for one tokenizer, off the engine's thread; any thread may call.

    `max_bytes` bounds a grammar's text and `timeout_s` the processor time of its check. Equal grammars are compiled
    once: results and refusals are kept for the last `cache_size` of them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        *,
        max_bytes: int = 128 * 2**10,
        timeout_s: float = 5.0,
        cache_size: int = 256,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._max_bytes = max_bytes
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self._futures: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._vocabulary_lock = threading.Lock()
        self._quick = _Lane(NUM_QUICK, min(QUICK_S, timeout_s), MAX_QUICK)
        self._slow = _Lane(1, timeout_s, MAX_SLOW)

    def submit(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Begin to compile; the future holds the result or a `GrammarError` (or `OverloadedError`).

        Every future ends within bounded time. Callers of equal grammars share one; it cannot be cancelled.
        """
        with self._lock:
            future = self._futures.get(grammar)
            if future is not None:
                self._futures.move_to_end(grammar)
                return future
            future = Future()
            future.set_running_or_notify_cancel()
            self._futures[grammar] = future
            done = [key for key, other in self._futures.items() if other.done()]
            for key in done[: max(0, len(self._futures) - self._cache_size)]:
                del self._futures[key]
        try:
            source = source_of(grammar, self._max_bytes)
            self._quick.start(lambda: self._attempt(self._quick, grammar, source, future))
        except ForetokenError as error:
            self._settle(grammar, future, error)
        return future

    def close(self) -> None:
        """End the checker processes; nothing more can be compiled."""
        self._quick.close()
        self._slow.close()
        with self._lock:
            waiting = [future for future in self._futures.values() if not future.done()]
        for future in waiting:
            _set(future, DrainingError("the server is shutting down"))

    def _attempt(self, lane: _Lane, grammar: Grammar, source: str, future: Future[CompiledGrammar]) -> None:
        """On a lane's thread: compile, or pass on to the slow lane what is late in the quick one."""
        try:
            error = lane.checker().check(source, lane.limit_s)
            if error is not None:
                raise refused(grammar, error)
            self._settle(grammar, future, self._compile(grammar, source))
        except _LateError:
            if lane is self._slow:
                late = f"it takes more than {lane.limit_s:g} s to compile: make it simpler"
                self._settle(grammar, future, refused(grammar, late))
                return
            try:
                self._slow.start(lambda: self._attempt(self._slow, grammar, source, future))
            except ForetokenError as overloaded:
                self._settle(grammar, future, overloaded)
        except ForetokenError as failed:
            self._settle(grammar, future, failed)
        except Exception as unforeseen:  # the caller waits: it must be told, whatever it was
            self._settle(grammar, future, EngineError(f"compiling the grammar failed: {unforeseen}"))

    def _compile(self, grammar: Grammar, source: str) -> CompiledGrammar:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._tokenizer.grammar_tokenizer(self._eos_token_ids)
        state = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=_limits())
        if state.is_error():
            raise refused(grammar, state.get_error())
        return CompiledGrammar(state, self._vocabulary.vocab_size)

    def _settle(
        self, grammar: Grammar, future: Future[CompiledGrammar], outcome: CompiledGrammar | ForetokenError
    ) -> None:
        if not isinstance(outcome, CompiledGrammar | GrammarError):  # not the grammar's fault: another time it may do
            with self._lock:
                if self._futures.get(grammar) is future:
                    del self._futures[grammar]
        _set(future, outcome)


def _set(future: Future[CompiledGrammar], outcome: CompiledGrammar | ForetokenError) -> None:
    with contextlib.suppress(InvalidStateError):  # it was ended by `close`
        if isinstance(outcome, CompiledGrammar):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)


def _limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        max_lexer_states=LIMITS["max_lexer_states"],
        step_lexer_fuel=LIMITS["step_lexer_fuel"],
        step_max_items=LIMITS["step_max_items"],
        verbose_errors=False,
    )


def _read_line(pipe: IO[bytes], limit_s: float) -> bytes:
    """A line of an unread pipe, or nothing where it ended. Raises `_LateError`."""
    if not select.select([pipe], [], [], limit_s)[0]:
        raise _LateError
    return pipe.readline()  # answers are written at once and are far shorter than a pipe holds
