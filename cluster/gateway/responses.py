"""The request body of `POST /v1/responses`, and the chat that it asks for.

Field by field as OpenAI's reference has it (platform.openai.com/docs/api-reference/responses/create), with the sampling
fields that vLLM adds. A conversation is a list of items; what the model is shown are messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from cluster.gateway.fields import (
    HONOURED,
    WITHOUT_EFFECT,
    RequestModel,
    Support,
    invalid,
    not_honoured,
    text_or_parts,
    unsupported,
    validate,
    without_effect,
)
from cluster.gateway.openai import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    ONE_OR_MANY,
    ChatCompletionRequest,
    ChatMessage,
    Count,
    Fraction,
    LogprobCount,
    Penalty,
    PositiveFraction,
    RepetitionPenalty,
    ShortText,
    Temperature,
)
from cluster.gateway.openai_tools import (
    MAX_TOOLS,
    CalledFunction,
    MadeCall,
    Name,
    NamedTool,
    ObjectText,
    ToolChoice,
    object_schema,
)

MAX_METADATA = 16
PASSED_ON = (  # to the chat, under the same name
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "tool_choice",
    "parallel_tool_calls",
    "thinking_token_budget",
    "chat_template_kwargs",
    "priority",
    "cache_salt",
)
LOGPROBS = "message.output_text.logprobs"
_NEEDED: dict[str, tuple[str, ...]] = {  # by an item's type
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
_OPTIONAL = {"function_call_output": ("name",), "reasoning": ("content", "summary")}
_MEMBERS = {"role", "content", "summary", "call_id", "name", "arguments", "output"}
_TEXT_OF_PART = {
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}
_BESIDE_TEXT = frozenset({"type", "annotations", "logprobs"})  # as a reply's parts have them
_NO_TOOL_OF_OURS = "tools are functions that the caller runs"

TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
            "required": ["type", "name"],
        },
    ]
}


def _item_type(value: Any) -> Any:
    if isinstance(value, str) and value not in _NEEDED:
        hint = "send the item itself" if value == "item_reference" else f"there are {', '.join(_NEEDED)}"
        raise not_honoured(f"an item of type {value!r:.40} is not supported: {hint}")
    return value


def _joined_parts(value: Any) -> Any:
    """Text parts become one string, each on a line of its own."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _TEXT_OF_PART:
            raise not_honoured(f"a content part of type {kind!r:.40} is not supported: this model reads text")
        member = _TEXT_OF_PART.get(kind) if isinstance(kind, str) else None
        if member is None or not set(part) <= {member, *_BESIDE_TEXT} or not isinstance(part.get(member), str):
            raise invalid('a content part must be {"type": "input_text" or "output_text", "text": "..."}')
        texts.append(part[member])
    return "\n".join(texts)


JOINED_PARTS = BeforeValidator(
    _joined_parts,
    # a refusal has its text under another name
    json_schema_input_type=text_or_parts(*(kind for kind, member in _TEXT_OF_PART.items() if member == "text")),
)


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _metadata(value: dict[str, str]) -> dict[str, str]:
    too_long = any(len(key) > 64 or len(text) > 512 for key, text in value.items())
    if len(value) > MAX_METADATA or too_long:
        raise invalid(f"has at most {MAX_METADATA} pairs of a key up to 64 characters and a text up to 512")
    return value


def _tool_type(value: Any) -> Any:
    if isinstance(value, str) and value != "function":
        raise not_honoured(f"a tool of type {value!r:.40} is not supported: {_NO_TOOL_OF_OURS}")
    return value


def _tool_choice(value: Any) -> ToolChoice:
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value  # type: ignore[return-value]
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "allowed_tools":
        raise not_honoured("a choice of type 'allowed_tools' is not supported: give only the allowed ones as tools")
    if isinstance(kind, str) and kind != "function":
        raise not_honoured(f"a choice of type {kind!r:.40} is not supported: {_NO_TOOL_OF_OURS}")
    if kind is None or set(value) != {"type", "name"} or not isinstance(value["name"], str):
        raise invalid('must be "none", "auto", "required" or {"type": "function", "name": "..."}')
    return NamedTool(value["name"])


class InputItem(RequestModel):
    """One item of a conversation: what its type needs of the members below."""

    type: Annotated[
        Literal["message", "function_call", "function_call_output", "reasoning"],
        HONOURED,
        BeforeValidator(_item_type),
    ] = "message"
    role: Annotated[Literal["user", "assistant", "system", "developer"] | None, HONOURED] = None
    content: Annotated[str | None, HONOURED, JOINED_PARTS] = None
    summary: Annotated[str | None, HONOURED, JOINED_PARTS] = None  # where thoughts have no content
    call_id: Annotated[ShortText | None, HONOURED] = None
    name: Annotated[Name | None, HONOURED] = None
    arguments: Annotated[ObjectText | None, HONOURED] = None
    output: Annotated[str | None, HONOURED, JOINED_PARTS] = None
    id: Annotated[ShortText | None, WITHOUT_EFFECT] = None
    status: Annotated[str | None, WITHOUT_EFFECT] = None
    phase: Annotated[str | None, WITHOUT_EFFECT] = None
    encrypted_content: Annotated[str | None, Support("without_effect", note="thoughts are read from content")] = None
    namespace: Annotated[Any, unsupported()] = None
    caller: Annotated[Any, unsupported()] = None
    async_: Annotated[bool, unsupported(False), Field(alias="async")] = False

    @model_validator(mode="after")
    def _check(self) -> InputItem:
        needed = _NEEDED[self.type]
        missing = next((name for name in needed if getattr(self, name) is None), None)
        if missing is not None:
            raise invalid(f"is required of an item of type {self.type}", field=missing)
        others = self.model_fields_set & _MEMBERS - {*needed, *_OPTIONAL.get(self.type, ())}
        if others:
            raise invalid(f"does not belong to an item of type {self.type}", field=min(others))
        return self

    def as_listed(self, item_id: str) -> dict[str, Any]:
        """As `GET /v1/responses/{id}/input_items` shows it."""
        item: dict[str, Any] = {"id": item_id, "type": self.type, "status": "completed"}
        if self.type == "message":
            kind = "output_text" if self.role == "assistant" else "input_text"
            extra: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
            return item | {"role": self.role, "content": [{"type": kind, "text": self.content, **extra}]}
        if self.type == "function_call":
            return item | {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        if self.type == "function_call_output":
            return item | {"call_id": self.call_id, "output": self.output}
        parts = [] if self.content is None else [{"type": "reasoning_text", "text": self.content}]
        summary = [] if self.summary is None else [{"type": "summary_text", "text": self.summary}]
        return item | {"summary": summary, "content": parts}


class ResponseTool(RequestModel):
    type: Annotated[Literal["function"], HONOURED, BeforeValidator(_tool_type)]
    name: Annotated[Name, HONOURED]
    description: Annotated[str | None, HONOURED] = None
    parameters: Annotated[dict[str, Any] | None, HONOURED, AfterValidator(object_schema)] = None
    strict: Annotated[
        bool | None, Support("without_effect", note="a schema is followed wherever tool_choice asks for a call")
    ] = None
    defer_loading: Annotated[bool, unsupported(False)] = False
    allowed_callers: Annotated[list[Any], unsupported(["direct"])] = ["direct"]
    output_schema: Annotated[Any, unsupported()] = None
    async_: Annotated[bool, unsupported(False), Field(alias="async")] = False


class TextFormat(RequestModel):
    type: Annotated[Literal["text", "json_object", "json_schema"], HONOURED]
    schema_: Annotated[dict[str, Any] | None, HONOURED, Field(alias="schema")] = None
    name: Annotated[str, WITHOUT_EFFECT] = ""
    description: Annotated[str, WITHOUT_EFFECT] = ""
    strict: Annotated[bool, WITHOUT_EFFECT] = True  # a schema is always followed

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise invalid("is given exactly where the type is json_schema", field="schema")
        return self

    def as_chats(self) -> dict[str, Any]:
        return {"type": self.type} | ({} if self.schema_ is None else {"json_schema": {"schema": self.schema_}})


class TextConfig(RequestModel):
    format: Annotated[TextFormat | None, HONOURED] = None
    verbosity: Annotated[str, unsupported("medium")] = "medium"


class ReasoningConfig(RequestModel):
    effort: Annotated[Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None, HONOURED] = None
    summary: Annotated[str | None, Support("without_effect", note="thoughts are given as they are")] = None
    generate_summary: Annotated[str | None, Support("without_effect", note="thoughts are given as they are")] = None
    context: Annotated[str, without_effect("auto")] = "auto"  # the chat template decides
    mode: Annotated[str, unsupported("standard")] = "standard"


class ResponseStreamOptions(RequestModel):
    include_obfuscation: Annotated[bool, WITHOUT_EFFECT] = False


class ResponsesRequest(RequestModel):
    """`POST /v1/responses`."""

    model: Annotated[str | None, HONOURED] = None
    input: Annotated[
        list[InputItem],
        HONOURED,
        BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
        Field(max_length=MAX_MESSAGES),
    ] = []  # may be empty behind a previous response
    instructions: Annotated[str | None, HONOURED] = None  # of this response alone
    previous_response_id: Annotated[ShortText | None, HONOURED] = None
    store: Annotated[bool, HONOURED] = True
    stream: Annotated[bool, HONOURED] = False
    stream_options: Annotated[ResponseStreamOptions | None, WITHOUT_EFFECT] = None
    include: Annotated[
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ],
        Support("honoured", note="logprobs; the others are of what no reply here has"),
    ] = []
    metadata: Annotated[dict[str, str], HONOURED, AfterValidator(_metadata)] = {}

    tools: Annotated[list[ResponseTool], HONOURED, Field(max_length=MAX_TOOLS)] = []
    tool_choice: Annotated[
        ToolChoice | None, HONOURED, PlainValidator(_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = None
    parallel_tool_calls: Annotated[bool, HONOURED] = True
    max_tool_calls: Annotated[Count | None, Support("without_effect", note="it counts calls of hosted tools")] = None
    text: Annotated[TextConfig | None, HONOURED] = None
    reasoning: Annotated[ReasoningConfig | None, HONOURED] = None
    thinking_token_budget: Annotated[Count | None, HONOURED] = None

    max_output_tokens: Annotated[int | None, HONOURED, Field(ge=1, le=2**31 - 1)] = None
    temperature: Annotated[Temperature | None, HONOURED] = None
    top_p: Annotated[PositiveFraction | None, HONOURED] = None
    top_logprobs: Annotated[LogprobCount | None, HONOURED] = None
    top_k: Annotated[int | None, HONOURED, Field(ge=-1, le=2**31 - 1)] = None
    min_p: Annotated[Fraction | None, HONOURED] = None
    seed: Annotated[int | None, HONOURED, Field(ge=-(2**63), le=2**63 - 1)] = None
    presence_penalty: Annotated[Penalty, HONOURED] = 0.0
    frequency_penalty: Annotated[Penalty, HONOURED] = 0.0
    repetition_penalty: Annotated[RepetitionPenalty | None, HONOURED] = None
    stop: Annotated[list[ShortText], HONOURED, ONE_OR_MANY, Field(max_length=MAX_STOP_STRINGS)] = []
    chat_template_kwargs: Annotated[dict[str, Any], HONOURED] = {}
    priority: Annotated[int, HONOURED, Field(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[ShortText | None, HONOURED] = None

    user: Annotated[str | None, WITHOUT_EFFECT] = None
    safety_identifier: Annotated[str | None, WITHOUT_EFFECT] = None
    prompt_cache_key: Annotated[str | None, WITHOUT_EFFECT] = None
    prompt_cache_retention: Annotated[str | None, WITHOUT_EFFECT] = None
    service_tier: Annotated[str, without_effect("auto", "default")] = "auto"
    truncation: Annotated[
        str, unsupported("disabled", note="a conversation that is too long is refused, never cut")
    ] = "disabled"
    background: Annotated[bool, unsupported(False, note="a response is made while its caller waits")] = False
    conversation: Annotated[Any, unsupported(note="use previous_response_id")] = None
    prompt: Annotated[Any, unsupported(note="there are no prompt templates")] = None
    context_management: Annotated[Any, unsupported([])] = None
    moderation: Annotated[Any, unsupported()] = None

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if not self.input and self.previous_response_id is None:
            raise invalid("is required", field="input")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include or bool(self.top_logprobs)

    @property
    def text_format(self) -> TextFormat:
        given = None if self.text is None else self.text.format
        return TextFormat(type="text") if given is None else given

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def chat(self, conversation: Sequence[ChatMessage]) -> ChatCompletionRequest:
        """The chat that it asks for, behind the messages of the responses before. Raises `RequestError`s."""
        first = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        data: dict[str, Any] = {name: getattr(self, name) for name in PASSED_ON if name in self.model_fields_set}
        data["messages"] = [*first, *conversation, *messages_of(self.input)]
        data["tools"] = [_as_chats_tool(tool) for tool in self.tools]
        data["max_completion_tokens"] = self.max_output_tokens
        data["response_format"] = self.text_format.as_chats()
        data["reasoning_effort"] = self.effort
        if self.wants_logprobs:
            data |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return validate(ChatCompletionRequest, data)


def _as_chats_tool(tool: ResponseTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(include={"name", "description", "parameters"})}


def messages_of(items: Sequence[InputItem]) -> list[ChatMessage]:
    """Thoughts, text and calls that follow each other are one message of the assistant's."""
    messages: list[ChatMessage] = []
    turn = AssistantTurn()
    for item in items:
        if item.type == "reasoning":
            if turn.has_answer:
                turn.end(messages)
            turn.thoughts.append(item.summary or "" if item.content is None else item.content)
        elif item.type == "function_call":
            function = CalledFunction(name=item.name or "", arguments=item.arguments or "")
            turn.calls.append(MadeCall(id=item.call_id, function=function))
        elif item.role == "assistant" and item.type == "message":
            if turn.has_answer:
                turn.end(messages)
            turn.texts.append(item.content or "")
        else:
            turn.end(messages)
            if item.type == "message":
                messages.append(ChatMessage(role=item.role or "user", content=item.content))
            else:
                messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output))
    turn.end(messages)
    return messages


class AssistantTurn:
    """What becomes one message of the assistant's."""

    def __init__(self) -> None:
        self.thoughts: list[str] = []
        self.texts: list[str] = []
        self.calls: list[MadeCall] = []

    @property
    def has_answer(self) -> bool:
        return bool(self.texts or self.calls)

    def end(self, messages: list[ChatMessage]) -> None:
        """Append the message, where there is one, and begin anew."""
        if self.thoughts or self.has_answer:
            content = "\n".join(self.texts)
            message = {
                "role": "assistant",
                "content": content if content or not self.calls else None,
                "reasoning": "\n".join(self.thoughts) or None,
                "tool_calls": self.calls,
            }
            messages.append(validate(ChatMessage, message))
        self.thoughts, self.texts, self.calls = [], [], []
