"""A checked request -> the `Submit` messages of its sequences, and what its reply needs to know."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import ContextLengthError, InvalidValueError, RequestError
from cluster.gateway.chat import ChatTemplate
from cluster.gateway.deltas import MakeParser, PlainText
from cluster.gateway.fields import RequestModel
from cluster.gateway.openai import ChatCompletionRequest, CompletionRequest, GenerationRequest
from cluster.gateway.parsing.reply_format import ReplyShape
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.tokenizer import TextTokenizer
from cluster.protocol import Hello, Sampling, Stopping, Submit


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request; `text` is what an echo shows of it."""

    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A request on its way: choice `p * n + i` is sample i of prompt p."""

    reply_id: str
    created: int  # UNIX seconds
    model: str
    request: GenerationRequest
    prompts: tuple[Prompt, ...]
    submits: tuple[Submit, ...]
    asked: RequestModel  # the same in its dialect's own words
    make_parser: MakeParser = PlainText  # of a chat's choices
    request_id: str = ""  # of the HTTP request

    def prompt_of(self, choice: int) -> Prompt:
        return self.prompts[choice // self.request.n]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Texts:
    """What text a request's words are turned into: prompts and forbidden sequences as token ids."""

    prompts: tuple[Prompt, ...]
    bad_words: tuple[tuple[int, ...], ...]


def render_chat(request: ChatCompletionRequest, template: ChatTemplate | RequestError) -> str:
    """The text of a chat's prompt; may take a while, so off the event loop. Raises `RequestError`s."""
    if isinstance(template, RequestError):
        raise template
    add_prompt = request.add_generation_prompt
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    if request.reasoning_effort == "none":
        variables["enable_thinking"] = False
    return template.render(
        [message.for_template() for message in request.messages],
        tools=[tool.for_template() for tool in request.offered_tools] or None,
        add_generation_prompt=not request.continue_final_message if add_prompt is None else add_prompt,
        continue_final_message=request.continue_final_message,
        variables=variables | request.chat_template_kwargs,
    )


def encode(
    request: GenerationRequest, tokenizer: TextTokenizer, chat_text: str | None, max_model_len: int | None = None
) -> Texts:
    """The token ids of a request's prompts (`chat_text`: the rendered chat) and words. Raises `InvalidValueError`.

    Prompts are cut to what the request says; to "what has room" by `max_model_len`.
    """
    if isinstance(request, CompletionRequest):
        prompts = tuple(_completion_prompt(prompt, request, tokenizer) for prompt in request.prompt)
    else:
        assert chat_text is not None, "a chat is rendered first"
        prompts = (Prompt(tuple(tokenizer.encode(chat_text, special_tokens=request.special_tokens)), chat_text),)
    if not all(prompt.ids for prompt in prompts):
        raise InvalidValueError("the prompt has no tokens; at least one is needed", param=_prompt_field(request))
    limit = request.truncate_prompt_tokens
    if limit is not None:
        if limit == -1:
            assert max_model_len is not None, "what has room is told"
            limit = max(1, max_model_len - _needed(request))
        prompts = tuple(_truncated(prompt, limit, request, tokenizer) for prompt in prompts)
    bad_words = tuple(ids for word in request.bad_words for ids in tokenizer.word_sequences(word))
    return Texts(prompts, bad_words)


def _truncated(prompt: Prompt, limit: int, request: GenerationRequest, tokenizer: TextTokenizer) -> Prompt:
    """At most `limit` tokens of a prompt: its end, or its beginning where the right side is cut off."""
    if len(prompt.ids) <= limit:
        return prompt
    ids = prompt.ids[-limit:] if request.truncation_side == "left" else prompt.ids[:limit]
    if isinstance(request, CompletionRequest) and request.echo:
        return Prompt(ids, tokenizer.decode(list(ids), skip_special_tokens=request.skip_special_tokens))
    return Prompt(ids, prompt.text)


def _needed(request: GenerationRequest) -> int:
    """Tokens that must have room behind the prompt."""
    return max(1 if request.token_limit is None else request.token_limit, request.min_tokens)


def check_lengths(
    request: GenerationRequest, tokenizer: TextTokenizer, chat_text: str | None, max_model_len: int
) -> None:
    """Raise `ContextLengthError` for a prompt that is too long for sure. Takes no time; `encode` may take long."""
    if request.truncate_prompt_tokens is not None:
        return
    prompts = request.prompt if isinstance(request, CompletionRequest) else [chat_text or ""]
    for prompt in prompts:
        least = tokenizer.min_tokens(prompt) if isinstance(prompt, str) else len(prompt)
        if least > max_model_len:
            raise ContextLengthError(
                f"this model's context length is {max_model_len} tokens, but the prompt has at least {least} tokens; "
                "shorten it",
                param=_prompt_field(request),
            )


def num_chars(request: GenerationRequest, chat_text: str | None) -> int:
    """How much text `encode` has to work through."""
    texts = request.prompt if isinstance(request, CompletionRequest) else [chat_text or ""]
    return sum(map(len, texts)) + sum(map(len, request.bad_words))


def _prompt_field(request: GenerationRequest) -> str:
    return "messages" if isinstance(request, ChatCompletionRequest) else "prompt"


def _completion_prompt(prompt: str | list[int], request: CompletionRequest, tokenizer: TextTokenizer) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(tuple(tokenizer.encode(prompt, special_tokens=request.special_tokens)), prompt)
    shown = tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens) if request.echo else ""
    return Prompt(tuple(prompt), shown)


def check_counts(request: GenerationRequest, settings: GatewaySettings) -> None:
    """Raise `InvalidValueError` where a request has more sequences than the operator allows."""
    if request.n > settings.max_choices:
        raise InvalidValueError(f"n must be at most {settings.max_choices}, got {request.n}", param="n")
    num_prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
    if num_prompts * request.n > settings.max_sequences:
        raise InvalidValueError(
            f"prompts times n must be at most {settings.max_sequences}, got {num_prompts} times {request.n}",
            param="prompt",
        )


def make_submits(
    request: GenerationRequest,
    texts: Texts,
    *,
    reply_id: str,
    hello: Hello,
    settings: GatewaySettings,
    timeout_s: float,
    shape: ReplyShape,
    traceparent: str = "",
) -> tuple[Submit, ...]:
    """One `Submit` a choice; the choices of one prompt are a group.

    Raises `ContextLengthError`, or `InvalidValueError` for a token id that the vocabulary has not.
    """
    stop_ids, bias = tuple(request.stop_token_ids), request.logit_bias
    check_ids("stop_token_ids", stop_ids, hello.vocab_size)
    check_ids("logit_bias", tuple(bias), hello.vocab_size)
    defaults = settings.sampling_defaults
    submits = []
    for index, prompt in enumerate(texts.prompts):
        # Equal prompts in one request are samples of their own, unless the caller fixed the seed.
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
        check_ids("prompt", prompt.ids, hello.vocab_size)
        stopping = Stopping(
            max_tokens=_max_tokens(request, len(prompt.ids), hello.max_model_len),
            min_tokens=request.min_tokens,
            stop=tuple(request.stop),
            include_stop=request.include_stop_str_in_output,
            stop_token_ids=stop_ids,
            ignore_eos=request.ignore_eos,
            skip_special_tokens=request.skip_special_tokens,
            shown_special_ids=shape.shown_special_ids,
        )
        for choice in range(request.n):
            sampling = Sampling(
                seed=seed,
                choice=choice,
                temperature=_given(request.temperature, defaults.temperature),
                top_k=max(_given(request.top_k, defaults.top_k), 0),
                top_p=_given(request.top_p, defaults.top_p),
                min_p=_given(request.min_p, defaults.min_p),
                typical_p=_given(request.typical_p, defaults.typical_p),
                repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                logit_bias=bias,
                bad_words=texts.bad_words,
                logprobs=request.num_logprobs,
                prompt_logprobs=request.num_prompt_logprobs,
                grammar=shape.grammar,
                thinking=shape.thinking,
            )
            submits.append(
                Submit(
                    request_id=f"{reply_id}-{index * request.n + choice}",
                    prompt_ids=prompt.ids,
                    sampling=sampling,
                    stopping=stopping,
                    group=f"{reply_id}-{index}" if request.n > 1 else "",
                    priority=request.priority,
                    deadline_s=timeout_s,
                    cache_salt=request.cache_salt or "",
                    traceparent=traceparent,
                )
            )
    return tuple(submits)


Number = TypeVar("Number", int, float)


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise `InvalidValueError` for a token id that the vocabulary has not."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidValueError(f"{name} has token id {wrong}; the vocabulary is 0..{vocab_size - 1}", param=name)


def _max_tokens(request: GenerationRequest, num_prompt: int, max_model_len: int) -> int:
    asked, needed = request.token_limit, _needed(request)
    if num_prompt + needed > max_model_len:
        raise ContextLengthError(
            f"this model's context length is {max_model_len} tokens, but {num_prompt + needed} were asked for: "
            f"{num_prompt} in the prompt and {needed} to generate; shorten the prompt or ask for fewer",
            param=_prompt_field(request),
        )
    return max_model_len - num_prompt if asked is None else asked
