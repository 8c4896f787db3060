"""A request's state inside the engine. Only the engine's thread writes it."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import ContextLengthError, InvalidValueError
from cluster.protocol import Finish, Pooling, Sampling, Stopping, Submit, TokenLogprobs

if TYPE_CHECKING:
    import torch

    from workers.sampling.guided import Matcher
    from workers.sampling.stop import StopChecker
    from workers.sampling.thinking import ThinkingMatcher


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: what was asked, the tokens so far, and how much of it lies in the KV cache.

    `tokens` is prompt and output behind each other; `num_computed` of them have their K and V in `page_ids`. The
    scheduler only ever sees `len(tokens) - num_computed`: it knows no phases.
    """

    request_id: str
    tokens: list[int]
    num_prompt: int
    sampling: Sampling
    stopping: Stopping
    group: str = ""
    priority: int = 0
    deadline: float = math.inf  # time.monotonic() seconds
    cache_salt: str = ""
    pooling: Pooling | None = None  # it ends with its prompt, whose embedding is its only output
    position_offset: int = 0  # added to each token's index to make its rotary position
    arrival: float = field(default_factory=time.monotonic)
    scheduled: float | None = None  # when it was in a step first, in the same seconds

    status: Status = Status.WAITING
    num_computed: int = 0
    page_ids: list[int] = field(default_factory=list)
    num_cached: int | None = None  # prompt tokens found in the prefix cache at the first admission
    page_hashes: list[bytes] = field(default_factory=list)  # chained hashes of the full pages of `tokens`
    num_published: int = 0  # of its pages, named in the prefix cache
    stop_checker: StopChecker | None = None
    matcher: Matcher | ThinkingMatcher | None = None  # the state of its grammar, and of its thoughts
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    ended: Finish | None = None  # the end that a resumed request's tokens had reached already
    told_prompt: bool = False  # its first output, which carries what concerns the prompt, is out
    pooled: torch.Tensor | None = None  # [hidden] float64: of what it computed so far (`workers.pooling`)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def is_guided(self) -> bool:
        """Whether a grammar, or the end of its thoughts, says what may come next."""
        return self.matcher is not None and self.matcher.is_active

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_prompt_ahead(self) -> int:
        return max(0, self.num_prompt - self.num_computed)

    def times(self) -> dict[str, float]:
        """`queue_s` and `prefill_s` of its first output, which is there now; none where it was in no step."""
        if self.scheduled is None:
            return {}
        return {"queue_s": self.scheduled - self.arrival, "prefill_s": time.monotonic() - self.scheduled}

    @classmethod
    def from_submit(cls, submit: Submit, *, vocab_size: int, max_model_len: int) -> Request:
        """Check a `Submit` against this engine and make its request.

        Raises `InvalidValueError` naming the field, or `ContextLengthError`.
        """
        check_submit(submit, vocab_size=vocab_size, max_model_len=max_model_len)
        return cls(
            request_id=submit.request_id,
            tokens=[*submit.prompt_ids, *submit.output_ids],
            num_prompt=len(submit.prompt_ids),
            sampling=submit.sampling,
            stopping=submit.stopping,
            group=submit.group,
            priority=submit.priority,
            deadline=math.inf if submit.deadline_s is None else time.monotonic() + submit.deadline_s,
            cache_salt=submit.cache_salt,
            pooling=submit.pooling,
        )


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not math.isfinite(value) or not (low < value if open_low else low <= value) or value > high:
        bracket = "(" if open_low else "["
        raise InvalidValueError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value!r}", param=name)


def check_submit(submit: Submit, *, vocab_size: int, max_model_len: int) -> None:
    """Raise where a field of `submit` is out of range for a model of this vocabulary and context length."""
    sampling, stopping = submit.sampling, submit.stopping
    if not submit.prompt_ids:
        raise InvalidValueError("the prompt is empty: at least one token is needed", param="prompt")
    for name, ids in (
        ("prompt", submit.prompt_ids),
        ("output_ids", submit.output_ids),
        ("stop_token_ids", stopping.stop_token_ids),
        ("shown_special_ids", stopping.shown_special_ids),
        ("logit_bias", tuple(sampling.logit_bias)),
        ("bad_words", tuple(token for word in sampling.bad_words for token in word)),
    ):
        if any(not 0 <= token < vocab_size for token in ids):
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise InvalidValueError(f"{name} has token id {wrong}; the vocabulary is 0..{vocab_size - 1}", param=name)
    if any(not word for word in sampling.bad_words):
        raise InvalidValueError("bad_words has an empty entry", param="bad_words")
    _within("temperature", sampling.temperature, 0.0, 100.0)
    _within("top_p", sampling.top_p, 0.0, 1.0, open_low=True)
    _within("min_p", sampling.min_p, 0.0, 1.0)
    _within("typical_p", sampling.typical_p, 0.0, 1.0, open_low=True)
    _within("top_k", sampling.top_k, 0, 2**31)
    _within("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)
    _within("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    for bias in sampling.logit_bias.values():
        _within("logit_bias", bias, -100.0, 100.0)
    for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if count is not None:
            _within(name, count, 0, 20)
    _within("max_tokens", stopping.max_tokens, 0, 2**31)
    _within("min_tokens", stopping.min_tokens, 0, max(stopping.max_tokens, 0))
    if any(not text for text in stopping.stop):
        raise InvalidValueError("stop has an empty string", param="stop")
    thinking = sampling.thinking
    if thinking is not None:
        if not thinking.start or not thinking.end:
            raise InvalidValueError("thinking needs the texts that open and close it", param="thinking")
        _within("thinking_token_budget", thinking.budget or 0, 0, 2**31)
    if submit.pooling is not None and (stopping.max_tokens or sampling.prompt_logprobs is not None):
        raise InvalidValueError("what is embedded goes on with no tokens and tells no logprobs", param="pooling")
    total = len(submit.prompt_ids) + stopping.max_tokens
    if total > max_model_len:
        raise ContextLengthError(
            f"the context length is {max_model_len} tokens, but {total} were asked for: {len(submit.prompt_ids)} in "
            f"the prompt and {stopping.max_tokens} in max_tokens",
            param="max_tokens",
        )
