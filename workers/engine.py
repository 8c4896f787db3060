"""The engine: requests in, tokens out, one fused forward pass at a time. `Engine.step` is its table of contents.

Synchronous, and deterministic given its inputs. One thread owns it (`workers.runner`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from msgspec import structs

from cluster.errors import DeadlineError, EngineError, ForetokenError, InvalidValueError, PeerLostError
from cluster.protocol import EngineState, Finish, RequestOutput, StepOutput, Submit, TokenLogprobs, TopLogprob
from workers.batch import Batcher, first_row
from workers.cache.kv_cache import KVCache
from workers.cache.page_table import PageTable
from workers.cache.pages import PagePool
from workers.counters import with_step
from workers.models.decoder import Decoder
from workers.models.tokenizer import Detokenizer, Tokenizer
from workers.pooling import embedding, take_pooled
from workers.request import Request, Status
from workers.sampling.guided import Matcher
from workers.sampling.sampler import Sampler, failure
from workers.sampling.stop import StopChecker
from workers.sampling.thinking import ThinkingMatcher
from workers.scheduler import MAX_LOGIT_ROWS, Scheduler, SchedulerOptions
from workers.step import SampledRow, Scheduled, StepPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """An engine's bounds. `num_pages` is what the KV cache holds in all."""

    max_model_len: int
    num_pages: int
    page_size: int = 64
    prefix_cache: bool = True
    scheduler: SchedulerOptions = SchedulerOptions()


class Engine:
    """Serves one model. See the interface in `docs/architecture.md`."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        options: EngineOptions,
        model_name: str = "",
    ) -> None:
        spec = decoder.spec
        embedding = decoder.weights.embedding
        self.options = options
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self._kv = KVCache(spec, options.num_pages, options.page_size, embedding.device, embedding.dtype)
        self.pool = PagePool(options.num_pages)
        facts = (model_name, str(embedding.dtype), decoder.numerics.name, spec.rope)
        clear_page = self._kv.clear_page if decoder.numerics.native is None else None
        self._pages = PageTable(
            self.pool, options.page_size, self._kv.copy_page, clear_page, facts, options.prefix_cache
        )
        self._scheduler = Scheduler(options.scheduler, self._pages)
        self._batcher = Batcher(
            options.page_size,
            decoder.windows,
            spec.num_heads,
            embedding.device,
            embedding.dtype,
            native=decoder.numerics.native is not None,
        )
        self._sampler = Sampler(spec.vocab_size, embedding.device, self.eos_token_ids, decoder.numerics.native)
        self._requests: dict[str, Request] = {}
        self._outputs: list[RequestOutput] = []  # made outside a step, or so far in this one
        self._state = EngineState()
        self.stalled = False  # the latest step could not run for want of experts

    # ------------------------------------------------------------------------------------------------ the interface

    def request_from(self, submit: Submit, matcher: Matcher | None = None) -> Request:
        """A checked request. Raises `InvalidValueError` or `ContextLengthError`; touches no state, any thread may call.

        `matcher` is the compiled form of the request's grammar.
        """
        request = Request.from_submit(
            submit, vocab_size=self.decoder.spec.vocab_size, max_model_len=self.options.max_model_len
        )
        num_pages = -(-(request.num_prompt + request.stopping.max_tokens) // self.options.page_size)
        if num_pages > self.options.num_pages:
            raise InvalidValueError(
                f"the request may need {num_pages} KV pages of {self.options.page_size} tokens and this engine has "
                f"{self.options.num_pages}: lower max_tokens, shorten it, or give the server more memory",
                param="prompt" if submit.pooling else "max_tokens",
            )
        request.stop_checker = self._stop_checker(request)
        thinking = request.sampling.thinking
        if thinking is None:
            request.matcher = matcher
        else:
            request.matcher = ThinkingMatcher(thinking, matcher, self.tokenizer, self.eos_token_ids)
        if request.num_output:
            request.ended = request.stop_checker.restore(request.output_ids)
            if request.matcher is not None:
                for token_id in request.output_ids:
                    request.matcher.accept(token_id)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `InvalidValueError` where its id is taken or its positions leave the context."""
        reach = request.position_offset + request.num_prompt + request.stopping.max_tokens
        if reach > self.options.max_model_len:
            raise InvalidValueError(
                f"position_offset {request.position_offset} takes the request to position {reach}, over the context "
                f"length of {self.options.max_model_len}",
                param="position_offset",
            )
        if request.request_id in self._requests:
            raise InvalidValueError(f"request id {request.request_id!r} is already running", param="request_id")
        self._requests[request.request_id] = request
        self._scheduler.add(request)
        if request.ended is not None:
            self._end(request, request.ended)

    def abort(self, request_id: str) -> None:
        """End a request now and free its pages; an unknown id is none of our business any more."""
        if (request := self._requests.get(request_id)) is not None:
            self._end(request, Finish(reason="abort"))

    def fork(self, request_id: str, new_id: str, at: int | None = None) -> None:
        """Let `new_id` go on from the first `at` tokens (default: all) of a request, on copy-on-write pages.

        Raises `InvalidValueError` for an unknown source, an id that is taken, or `at` outside the sequence.
        """
        source = self._find(request_id)
        at = len(source.tokens) if at is None else at
        if not source.num_prompt <= at <= len(source.tokens):
            raise InvalidValueError(
                f"at must be in [{source.num_prompt}, {len(source.tokens)}] to fork {request_id!r}, got {at}",
                param="at",
            )
        target = replace(
            source,
            request_id=new_id,
            tokens=source.tokens[:at],
            group="",
            status=Status.WAITING,
            num_computed=0,
            page_ids=[],
            page_hashes=[],
            num_published=0,
            stop_checker=None,
            matcher=None,
            prompt_logprobs=list(source.prompt_logprobs),
        )
        self._restate(target, source)
        self._pages.share(source, target, min(source.num_computed, at - 1))
        try:
            self.submit(target)
        except InvalidValueError:
            self._pages.release(target)
            raise

    def rewind(self, request_id: str, at: int) -> None:
        """Take a request back to its first `at` tokens; it goes on from there."""
        request = self._find(request_id)
        if not request.num_prompt <= at <= len(request.tokens):
            raise InvalidValueError(
                f"at must be in [{request.num_prompt}, {len(request.tokens)}] to rewind {request_id!r}, got {at}",
                param="at",
            )
        del request.tokens[at:]
        self._pages.truncate(request, min(request.num_computed, at - 1))
        self._restate(request, request)

    @torch.inference_mode()
    def score(self, request_id: str, ids: Sequence[int]) -> list[float]:
        """The log probability of each of `ids` behind a request's tokens, on a fork that is then discarded.

        Raises `OutOfPagesError` where there is no room for the fork, `InvalidValueError` for an unknown request or
        more ids than the context has room for.
        """
        source = self._find(request_id)
        if not ids:
            return []
        if (reach := source.position_offset + len(source.tokens) + len(ids)) > self.options.max_model_len:
            raise InvalidValueError(
                f"scoring {len(ids)} tokens reaches position {reach}, over the context length of "
                f"{self.options.max_model_len}",
                param="ids",
            )
        fork = replace(
            source, tokens=[*source.tokens, *ids], num_computed=0, page_ids=[], page_hashes=[], num_published=0
        )
        self._pages.share(source, fork, min(source.num_computed, len(source.tokens) - 1))
        logprobs: list[float] = []
        try:
            while fork.num_uncomputed > 1:  # the last id's own logits are not needed
                num_tokens = min(fork.num_uncomputed - 1, self.options.scheduler.token_budget, MAX_LOGIT_ROWS)
                self._pages.reserve(fork, num_tokens)
                rows_from = min(max(0, len(source.tokens) - 1 - fork.num_computed), num_tokens)
                batch = self._batcher.build([Scheduled(fork, num_tokens)], [rows_from])
                logits = self.decoder.forward(batch, self._kv)
                first = fork.num_computed + rows_from + 1
                targets = fork.tokens[first : first + logits.shape[0]]
                logprobs += [row.logprob for row in self._score(logits, targets, 0)]
                fork.num_computed += num_tokens
        finally:
            self._pages.release(fork)
        return logprobs

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """Run one fused forward pass over what the scheduler picked; an empty output when idle.

        Where experts are out of reach it is `stalled`: no request has moved, and the next step tries again.
        """
        started = time.perf_counter()
        self._expire()
        plan = self._scheduler.schedule()
        self.stalled = False
        if plan.scheduled:
            try:
                rows_from = [first_row(item.request, item.num_tokens) for item in plan.scheduled]
                batch = self._batcher.build(plan.scheduled, rows_from)
                forward_started = time.perf_counter()
                hidden = self.decoder.last_hidden(batch, self._kv)
                rows_from, hidden = take_pooled(plan, rows_from, hidden)
                logits = self.decoder.logits(hidden)
                forward_s = time.perf_counter() - forward_started
                sampled = self._sample(plan, rows_from, logits)
                num_prompt = sum(_prompt_part(item) for item in plan.scheduled)
                self._commit(plan, sampled)
                num_generated = sum(1 for row in sampled if row is not None)
                self._state = with_step(
                    self._state,
                    plan,
                    num_prompt=num_prompt,
                    num_generated=num_generated,
                    forward_s=forward_s,
                    step_s=time.perf_counter() - started,
                )
            except PeerLostError as error:  # left the forward pass: nothing is sampled, nothing committed
                log.warning("a step of %d sequences waits for experts: %s", len(plan.scheduled), error.message)
                self.stalled = True
            except Exception as error:
                log.exception("a step of %d sequences failed", len(plan.scheduled))
                self._fail(plan, error)
        return self._collect()

    def tend(self) -> StepOutput:
        """What needs no forward pass: end whom their deadline has passed, hand over what was made between steps."""
        self._expire()
        return self._collect()

    def give_up(self, arrived_by: float, error: ForetokenError) -> None:
        """End with `error` the requests that arrived by then (`time.monotonic()` seconds)."""
        for request in [request for request in self._requests.values() if request.arrival <= arrived_by]:
            self._end(request, Finish(reason="error", error_code=error.code, error_message=error.message))

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._outputs)

    def snapshot(self) -> EngineState:
        """Numbers for metrics, the controller and the dashboard."""
        scheduler = self._scheduler
        return structs.replace(
            self._state,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            prompt_tokens_ahead=sum(request.num_prompt_ahead for request in self._requests.values()),
            pages_total=self.pool.num_pages,
            pages_free=self.pool.num_free,
            preemptions=scheduler.num_preemptions,
            queried_tokens=scheduler.num_queried_tokens,
            cached_tokens=scheduler.num_cached_tokens,
        )

    # ----------------------------------------------------------------------------------------------- parts of a step

    def _collect(self) -> StepOutput:
        outputs, self._outputs = self._outputs, []
        return StepOutput(outputs=outputs)

    def _sample(self, plan: StepPlan, rows_from: Sequence[int], logits: torch.Tensor) -> list[SampledRow | None]:
        """The next token of each item that computed its whole sequence; None for the others."""
        requests: list[Request] = []
        rows: list[int] = []
        places: list[int] = []
        next_row = 0
        for place, (item, first) in enumerate(zip(plan.scheduled, rows_from, strict=True)):
            request, num_rows = item.request, item.num_tokens - first
            if num_rows and request.sampling.prompt_logprobs is not None:
                self._score_prompt(request, item.num_tokens, logits[next_row : next_row + num_rows])
            next_row += num_rows
            complete = request.num_computed + item.num_tokens == len(request.tokens)
            if complete and request.num_output < request.stopping.max_tokens:
                requests.append(request)
                rows.append(next_row - 1)
                places.append(place)
        sampled: list[SampledRow | None] = [None] * len(plan.scheduled)
        if requests:
            if len(rows) != logits.shape[0]:
                logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
            for place, row in zip(places, self._sampler.sample(logits, requests), strict=True):
                sampled[place] = row
        return sampled

    def _score_prompt(self, request: Request, num_tokens: int, logits: torch.Tensor) -> None:
        """Keep the log probabilities of the prompt tokens behind the next `num_tokens`; logits [num_tokens or 1, V]."""
        if logits.shape[0] != num_tokens:  # the prompt was computed before
            return
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)
        # After a preemption the prompt runs again: what is known already is not taken twice.
        known = len(request.prompt_logprobs)
        first = known - 1 - request.num_computed
        last = min(num_tokens, request.num_prompt - 1 - request.num_computed)
        if first < last:
            targets = request.tokens[known : request.num_computed + last + 1]
            scored = self._score(logits[first:last], targets, request.sampling.prompt_logprobs or 0)
            request.prompt_logprobs += [self._logprobs(row) for row in scored]

    def _commit(self, plan: StepPlan, sampled: Sequence[SampledRow | None]) -> None:
        """Take the step's result into the requests' state and emit what it means for each."""
        for item, row in zip(plan.scheduled, sampled, strict=True):
            request = item.request
            request.num_computed += item.num_tokens
            self._pages.publish(request)
            if row is not None:
                self._take(request, row)
            elif request.num_uncomputed == 0:  # nothing was to be generated
                vector, finish = (b"", Finish(reason="length")) if request.pooling is None else embedding(request)
                index = request.num_output
                self._emit(request, RequestOutput(request_id=request.request_id, index=index, embedding=vector))
                self._end(request, finish)

    def _take(self, request: Request, row: SampledRow) -> None:
        """Append a sampled token, and end the request where it says so."""
        if (error := failure(request, row)) is not None:
            self._end(request, Finish(reason="error", error_code=error.code, error_message=error.message))
            return
        index = request.num_output
        request.tokens.append(row.token_id)
        assert request.stop_checker is not None
        text, finish = request.stop_checker.push([row.token_id])
        if request.matcher is not None:
            request.matcher.accept(row.token_id)
            if finish is None and request.matcher.is_stopped:
                text, finish = text + request.stop_checker.flush(), Finish(reason="stop")
        logprobs = [] if request.sampling.logprobs is None else [self._logprobs(row)]
        self._emit(
            request,
            RequestOutput(
                request_id=request.request_id, index=index, token_ids=[row.token_id], text=text, logprobs=logprobs
            ),
        )
        if finish is not None:
            self._end(request, finish)

    def _emit(self, request: Request, output: RequestOutput) -> None:
        if not request.told_prompt:  # the first output also tells about the prompt
            request.told_prompt = True
            output = structs.replace(
                output,
                cached_tokens=request.num_cached or 0,
                prompt_logprobs=request.prompt_logprobs or None,
                **request.times(),
            )
        self._outputs.append(output)

    def _logprobs(self, row: SampledRow) -> TokenLogprobs:
        token_bytes = self.tokenizer.token_bytes
        top = [
            TopLogprob(token_id, token_bytes(token_id), logprob)
            for token_id, logprob in zip(row.top_ids, row.top_logprobs, strict=True)
        ]
        return TokenLogprobs(row.token_id, token_bytes(row.token_id), row.logprob, row.rank, top)

    # -------------------------------------------------------------------------------------------------- ends of a life

    def _end(self, request: Request, finish: Finish) -> None:
        """A request's one terminal event: its pages are free, its last output carries `finish`."""
        self._scheduler.remove(request)
        self._sampler.forget(request.request_id)
        del self._requests[request.request_id]
        last = self._outputs[-1] if self._outputs else None
        if last is not None and last.request_id == request.request_id:
            self._outputs[-1] = structs.replace(last, finish=finish)
        else:
            self._outputs.append(RequestOutput(request_id=request.request_id, index=request.num_output, finish=finish))

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """A step that could not run ends the requests in it, and only those."""
        code = error.code if isinstance(error, ForetokenError) else EngineError.code
        message = error.message if isinstance(error, ForetokenError) else f"the step failed: {type(error).__name__}"
        for item in plan.scheduled:
            if item.request.status is Status.RUNNING:
                self._end(item.request, Finish(reason="error", error_code=code, error_message=message))

    def _expire(self) -> None:
        now = time.monotonic()
        for request in [request for request in self._requests.values() if request.deadline < now]:
            message = "the request's deadline passed before it was done"
            self._end(request, Finish(reason="error", error_code=DeadlineError.code, error_message=message))

    # --------------------------------------------------------------------------------------------------------- helpers

    def _score(self, logits: torch.Tensor, targets: Sequence[int], num_top: int) -> list[SampledRow]:
        return self._sampler.score(logits, torch.tensor(targets, device=logits.device), num_top)

    def _find(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None or request.pooling is not None:
            raise InvalidValueError(f"no request {request_id!r} is generating", param="request_id")
        return request

    def _stop_checker(self, request: Request) -> StopChecker:
        stopping = request.stopping
        detokenizer = Detokenizer(self.tokenizer, stopping.skip_special_tokens, stopping.shown_special_ids)
        return StopChecker(detokenizer, stopping, self.eos_token_ids)

    def _restate(self, target: Request, source: Request) -> None:
        """Make the stop checker and the grammar's matcher of `target` stand behind its own tokens."""
        target.stop_checker = self._stop_checker(target)
        target.stop_checker.restore(target.output_ids)
        if source.matcher is not None:
            target.matcher = source.matcher.restarted()
            for token_id in target.output_ids:
                target.matcher.accept(token_id)


def _prompt_part(item: Scheduled) -> int:
    """How many of a scheduled item's tokens are of the prompt."""
    return max(0, min(item.num_tokens, item.request.num_prompt - item.request.num_computed))
