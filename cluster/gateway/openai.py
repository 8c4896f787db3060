"""The request bodies of OpenAI's API, with the fields that vLLM and its clients add.

A field is annotated once with its `Support`; an unknown or unhonoured one is refused, never ignored. A default of
None stands for the checkpoint's own (`SamplingDefaults`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator

from cluster.gateway.fields import (
    HONOURED,
    WITHOUT_EFFECT,
    RequestModel,
    Support,
    invalid,
    not_honoured,
    text_or_parts,
    unsupported,
    without_effect,
)
from cluster.gateway.openai_formats import (
    Choices,
    Pattern,
    ResponseFormat,
    Schema,
    StructuralTag,
    StructuredOutputs,
    choice_grammar,
    schema_grammar,
)
from cluster.gateway.openai_tools import (
    TOOL_CHOICE_SCHEMA,
    MadeCalls,
    NamedTool,
    Tool,
    ToolChoice,
    Tools,
    read_tool_choice,
)
from cluster.protocol import Grammar

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_MESSAGES = 16384
MAX_LIST = 1024  # entries of bad_words, stop_token_ids, logit_bias

Number = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[Number, Field(ge=0.0, le=2.0)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[Number, Field(gt=0.0, le=1.0)]
RepetitionPenalty = Annotated[Number, Field(ge=0.01, le=100.0)]
Penalty = Annotated[Number, Field(ge=-2.0, le=2.0)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Prompts: TypeAlias = list[str] | list[list[int]]
PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ONE_OR_MANY = BeforeValidator(_one_or_many, json_schema_input_type=ShortText | list[ShortText])


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_LIST:
        raise invalid(f"must be an object of at most {MAX_LIST} token ids")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(f"{key!r:.40} is not a token id")
        if type(bias) not in (int, float) or not math.isfinite(bias) or abs(bias) > 100:
            raise invalid(f"the bias of token {key} must be a number in [-100, 100]")
    return {int(key): float(bias) for key, bias in value.items()}


def read_prompts(value: Any) -> Prompts:
    """A prompt is a string or a list of token ids; a request has one of them, or a list of one kind."""
    if isinstance(value, str):
        return [value]
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {int}:
        return [value]
    if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) == {int} for ids in value)):
        return value  # type: ignore[no-any-return]
    raise invalid(
        "must be a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
    )


def is_json(answer: Grammar | StructuralTag) -> bool:
    return isinstance(answer, Grammar) and answer.kind in ("json_object", "json_schema")


def _joined_parts(value: Any) -> Any:
    """Text parts become one string, each on a line of its own (as vLLM does for templates that read strings)."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise not_honoured(f"a content part of type {kind!r:.40} is not supported: this model reads text")
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise invalid('a content part must be {"type": "text", "text": "..."}')
    return "\n".join(part["text"] for part in value)


class StreamOptions(RequestModel):
    include_usage: Annotated[bool, HONOURED] = False
    continuous_usage_stats: Annotated[bool, HONOURED] = False
    include_obfuscation: Annotated[bool, WITHOUT_EFFECT] = False


class GenerationRequest(RequestModel):
    """What both endpoints share."""

    model: Annotated[str | None, HONOURED] = None
    stream: Annotated[bool, HONOURED] = False
    stream_options: Annotated[StreamOptions | None, HONOURED] = None
    n: Annotated[int, HONOURED, Field(ge=1, le=128)] = 1
    best_of: Annotated[int | None, Support("without_effect", note="it must be n")] = None

    temperature: Annotated[Temperature | None, HONOURED] = None
    top_p: Annotated[PositiveFraction | None, HONOURED] = None
    top_k: Annotated[int | None, HONOURED, Field(ge=-1, le=2**31 - 1)] = None  # 0 and -1: off
    min_p: Annotated[Fraction | None, HONOURED] = None
    typical_p: Annotated[PositiveFraction | None, HONOURED] = None
    repetition_penalty: Annotated[RepetitionPenalty | None, HONOURED] = None
    presence_penalty: Annotated[Penalty, HONOURED] = 0.0
    frequency_penalty: Annotated[Penalty, HONOURED] = 0.0
    seed: Annotated[int | None, HONOURED, Field(ge=-(2**63), le=2**63 - 1)] = None
    logit_bias: Annotated[
        dict[int, float],
        HONOURED,
        PlainValidator(_logit_bias),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
    ] = {}
    bad_words: Annotated[list[ShortText], HONOURED, Field(max_length=MAX_LIST)] = []
    response_format: Annotated[ResponseFormat | None, HONOURED] = None
    structured_outputs: Annotated[StructuredOutputs | None, HONOURED] = None
    guided_json: Annotated[Schema | None, HONOURED] = None  # the older names of its members
    guided_regex: Annotated[Pattern | None, HONOURED] = None
    guided_choice: Annotated[Choices | None, HONOURED] = None
    guided_grammar: Annotated[Pattern | None, HONOURED] = None

    max_tokens: Annotated[Count | None, HONOURED] = None  # None: what is left of the context
    min_tokens: Annotated[Count, HONOURED] = 0
    stop: Annotated[list[ShortText], HONOURED, ONE_OR_MANY, Field(max_length=MAX_STOP_STRINGS)] = []
    stop_token_ids: Annotated[list[TokenId], HONOURED, Field(max_length=MAX_LIST)] = []
    include_stop_str_in_output: Annotated[bool, HONOURED] = False
    ignore_eos: Annotated[bool, HONOURED] = False
    skip_special_tokens: Annotated[bool, HONOURED] = True

    truncate_prompt_tokens: Annotated[int | None, HONOURED, Field(ge=-1, le=2**31 - 1)] = None  # -1: to what has room
    truncation_side: Annotated[Literal["left", "right"], HONOURED] = "left"  # where tokens are cut off
    prompt_logprobs: Annotated[LogprobCount | None, HONOURED] = None
    return_token_ids: Annotated[bool, HONOURED] = False
    priority: Annotated[int, HONOURED, Field(ge=-(2**31), le=2**31 - 1)] = 0  # lower is sooner
    cache_salt: Annotated[ShortText | None, HONOURED] = None

    user: Annotated[str | None, WITHOUT_EFFECT] = None
    metadata: Annotated[dict[str, Any] | None, WITHOUT_EFFECT] = None
    store: Annotated[bool, without_effect(False)] = False
    service_tier: Annotated[str, without_effect("auto", "default")] = "auto"
    safety_identifier: Annotated[str | None, WITHOUT_EFFECT] = None
    prompt_cache_key: Annotated[str | None, WITHOUT_EFFECT] = None

    session_id: Annotated[str | None, Support("without_effect", note="equal prompt beginnings stay together")] = None
    request_id: Annotated[Any, unsupported(note="send it as the header X-Request-Id")] = None
    data_parallel_rank: Annotated[Any, unsupported(note="the worker is picked by prefix and load")] = None
    use_beam_search: Annotated[bool, unsupported(False)] = False
    length_penalty: Annotated[float, unsupported(1.0, 1)] = 1.0
    spaces_between_special_tokens: Annotated[bool, unsupported(True)] = True
    kv_transfer_params: Annotated[Any, unsupported()] = None

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise invalid("is only allowed with stream: true", field="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("is not available with stream: true", field="prompt_logprobs")
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise invalid(f"must be at most max_tokens ({limit}), got {self.min_tokens}", field="min_tokens")
        if self.best_of is not None and self.best_of != self.n:
            raise not_honoured(f"may only be n ({self.n}): candidates are not ranked", field="best_of")
        if self.truncate_prompt_tokens == 0:
            raise invalid("must be at least 1, or -1 for what has room", field="truncate_prompt_tokens")
        asked = list(self._answers())
        if len(asked) > 1:
            raise invalid(f"cannot be kept beside {asked[0][0]}: ask for one form", field=asked[1][0])
        if asked:
            self._check_ends(asked[0][0])
        return self

    def _check_ends(self, field: str) -> None:
        """What has a form ends when it is complete."""
        for name, given in (("min_tokens", self.min_tokens > 0), ("ignore_eos", self.ignore_eos)):
            if given:
                raise invalid(f"cannot be kept beside {field}: a complete answer ends", field=name)

    def _answers(self) -> Iterator[tuple[str, Grammar | StructuralTag]]:
        if self.response_format is not None and (answer := self.response_format.answer) is not None:
            yield "response_format", answer
        if self.structured_outputs is not None:
            yield "structured_outputs", self.structured_outputs.answer
        if self.guided_json is not None:
            yield "guided_json", schema_grammar(self.guided_json)
        if self.guided_regex is not None:
            yield "guided_regex", Grammar(kind="regex", source=self.guided_regex)
        if self.guided_choice is not None:
            yield "guided_choice", choice_grammar(self.guided_choice)
        if self.guided_grammar is not None:
            yield "guided_grammar", Grammar(kind="lark", source=self.guided_grammar)

    @property
    def answer_format(self) -> tuple[str, Grammar | StructuralTag] | None:
        """What the answer must match, behind the field that says so."""
        return next(self._answers(), None)

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None: what is left of the context."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives wanted with each generated token; None: no logprobs."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs

    @property
    @abstractmethod
    def special_tokens(self) -> bool:
        """Whether the tokenizer's post-processor adds its special tokens to the prompt."""


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Prompts,
        HONOURED,
        PlainValidator(read_prompts),
        WithJsonSchema(PROMPTS_SCHEMA),
    ]
    echo: Annotated[bool, HONOURED] = False
    logprobs: Annotated[LogprobCount | None, HONOURED] = None
    add_special_tokens: Annotated[bool, HONOURED] = True
    suffix: Annotated[str, unsupported("")] = ""

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid("must be at least 1 (0 is for echo and prompt_logprobs)", field="max_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(wanted, default=None)

    @property
    def special_tokens(self) -> bool:
        return self.add_special_tokens


class ChatMessage(RequestModel):
    """One message; what is set of it is what the chat template sees."""

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], HONOURED]
    content: Annotated[
        str | None, HONOURED, BeforeValidator(_joined_parts, json_schema_input_type=text_or_parts("text"))
    ] = None
    name: Annotated[str | None, HONOURED] = None
    tool_call_id: Annotated[str | None, HONOURED] = None
    reasoning: Annotated[str | None, HONOURED] = None
    reasoning_content: Annotated[str | None, HONOURED] = None  # the older name
    tool_calls: Annotated[MadeCalls, HONOURED] = []
    function_call: Annotated[Any, unsupported(note="use tool_calls")] = None
    refusal: Annotated[str, unsupported("")] = ""
    annotations: Annotated[list[Any], unsupported([])] = []
    audio: Annotated[Any, unsupported()] = None

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise invalid("belong to messages of the role assistant", field="tool_calls")
        if self.content is None and not self.tool_calls:
            raise invalid("is required; only a message with tool_calls may go without", field="content")
        return self

    def for_template(self) -> dict[str, Any]:
        """As transformers' templates read it: what was given of it, the calls' arguments as objects."""
        message = self.model_dump(include={"role", "content", "name", "tool_call_id"}, exclude_none=True)
        message.setdefault("content", "")
        thoughts = self.reasoning_content if self.reasoning is None else self.reasoning
        if thoughts is not None:
            message["reasoning_content"] = thoughts
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], HONOURED, Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Count | None, HONOURED] = None  # goes before max_tokens
    logprobs: Annotated[bool, HONOURED] = False
    top_logprobs: Annotated[LogprobCount | None, HONOURED] = None
    chat_template_kwargs: Annotated[dict[str, Any], HONOURED] = {}
    add_generation_prompt: Annotated[bool | None, HONOURED] = None  # None: unless the final message is continued
    continue_final_message: Annotated[bool, HONOURED] = False
    add_special_tokens: Annotated[bool, HONOURED] = False  # the template has them

    tools: Annotated[Tools, HONOURED] = []
    tool_choice: Annotated[
        ToolChoice | None, HONOURED, PlainValidator(read_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = None  # None: auto where there are tools
    parallel_tool_calls: Annotated[bool, HONOURED] = True  # false: one call at most
    functions: Annotated[list[Any], unsupported([], note="use tools")] = []
    function_call: Annotated[Any, unsupported("none", note="use tool_choice")] = None

    reasoning_effort: Annotated[Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None, HONOURED] = None
    include_reasoning: Annotated[bool, HONOURED] = True
    thinking_token_budget: Annotated[Count | None, HONOURED] = None  # behind so many the thoughts are ended

    modalities: Annotated[list[Any], unsupported(["text"])] = ["text"]
    audio: Annotated[Any, unsupported()] = None
    prediction: Annotated[Any, unsupported()] = None
    verbosity: Annotated[Any, unsupported()] = None
    web_search_options: Annotated[Any, unsupported()] = None
    chat_template: Annotated[Any, unsupported(note="the checkpoint's template is used")] = None
    documents: Annotated[Any, unsupported([])] = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("is only allowed with logprobs: true", field="top_logprobs")
        if self.token_limit == 0 and self.prompt_logprobs is None:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise invalid("must be at least 1", field=name)
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("cannot be with add_generation_prompt: true", field="continue_final_message")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise invalid(f"{twice!r} is there twice: each name stands for one tool", field="tools")
        choice, answer = self.tool_choice, self.answer_format
        if self.must_call and not names:
            raise invalid("asks for a call, but there are no tools", field="tool_choice")
        if isinstance(choice, NamedTool) and choice.name not in names:
            raise invalid(f"names {choice.name!r:.80}, which is none of the tools", field="tool_choice")
        if self.must_call:
            self._check_ends("tool_choice")
            if answer is not None:
                raise invalid("cannot be kept beside a tool_choice that asks for a call", field=answer[0])
        if self.offered_tools and answer is not None and not is_json(answer[1]):
            raise invalid("cannot be kept beside tools, but with tool_choice: none", field=answer[0])

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """The reply is calls and nothing else."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def special_tokens(self) -> bool:
        return self.add_special_tokens
