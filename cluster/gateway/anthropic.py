"""The request bodies of Anthropic's Messages API, and the chat that they ask for.

Field by field as its reference has it (docs.anthropic.com/en/api/messages). A message is a list of blocks; what the
model is shown are a chat's messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

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
    ChatCompletionRequest,
    ChatMessage,
    Count,
    Number,
    PositiveFraction,
    ShortText,
)
from cluster.gateway.openai_tools import MAX_TOOLS, Name, NamedTool, object_schema

MAX_BLOCKS = 4096  # of one message
_NEEDED: dict[str, tuple[str, ...]] = {  # by a block's type
    "text": ("text",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
}
_OPTIONAL = {"tool_result": ("content",)}
_MEMBERS = {"text", "thinking", "id", "name", "input", "tool_use_id", "content"}
_KEEP_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}

Temperature = Annotated[Number, Field(ge=0.0, le=1.0)]  # Anthropic's temperatures end at 1


def _joined_text(value: Any) -> Any:
    """Text blocks become one string, each on a line of its own."""
    if not isinstance(value, list):
        return value
    for block in value:
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise not_honoured(f"a block of type {kind!r:.40} is not supported here: this model reads text")
        known = kind == "text" and set(block) <= {"type", "text", "cache_control", "citations"}
        if not known or not isinstance(block.get("text"), str):
            raise invalid('a block must be {"type": "text", "text": "..."}')
    return "\n".join(block["text"] for block in value)


JOINED_TEXT = BeforeValidator(_joined_text, json_schema_input_type=text_or_parts("text"))


def _blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _block_type(value: Any) -> Any:
    if isinstance(value, str) and value not in _NEEDED:
        raise not_honoured(f"a block of type {value!r:.40} is not supported: this model reads text and calls of tools")
    return value


def _tool_type(value: Any) -> Any:
    if isinstance(value, str) and value != "custom":
        raise not_honoured(f"a tool of type {value!r:.40} is not supported: tools are those that the caller runs")
    return value


class Block(RequestModel):
    """One block of a message: what its type needs of the members below."""

    type: Annotated[
        Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"],
        HONOURED,
        BeforeValidator(_block_type),
    ]
    text: Annotated[str | None, HONOURED] = None
    thinking: Annotated[str | None, HONOURED] = None
    id: Annotated[ShortText | None, HONOURED] = None
    name: Annotated[Name | None, HONOURED] = None
    input: Annotated[dict[str, Any] | None, HONOURED] = None
    tool_use_id: Annotated[ShortText | None, HONOURED] = None
    content: Annotated[str | None, HONOURED, JOINED_TEXT] = None  # a tool's result
    is_error: Annotated[bool, Support("without_effect", note="the content says so")] = False
    signature: Annotated[str | None, WITHOUT_EFFECT] = None
    data: Annotated[str | None, Support("without_effect", note="thoughts of another server's cannot be read")] = None
    cache_control: Annotated[dict[str, Any] | None, WITHOUT_EFFECT] = None  # equal beginnings are always kept
    citations: Annotated[list[Any] | None, WITHOUT_EFFECT] = None
    caller: Annotated[Any, unsupported({"type": "direct"})] = None
    toolset_name: Annotated[Any, unsupported()] = None

    @model_validator(mode="after")
    def _check(self) -> Block:
        needed = _NEEDED[self.type]
        missing = next((name for name in needed if getattr(self, name) is None), None)
        if missing is not None:
            raise invalid(f"is required of a block of type {self.type}", field=missing)
        others = self.model_fields_set & _MEMBERS - {*needed, *_OPTIONAL.get(self.type, ())}
        if others:
            raise invalid(f"does not belong to a block of type {self.type}", field=min(others))
        return self


class InputMessage(RequestModel):
    role: Annotated[Literal["user", "assistant", "system"], HONOURED]
    content: Annotated[
        list[Block],
        HONOURED,
        BeforeValidator(_blocks, json_schema_input_type=str | list[Block]),
        Field(max_length=MAX_BLOCKS),
    ]

    @model_validator(mode="after")
    def _check(self) -> InputMessage:
        allowed = {
            "user": ("text", "tool_result"),
            "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
            "system": ("text",),
        }[self.role]
        wrong = next((block.type for block in self.content if block.type not in allowed), None)
        if wrong is not None:
            raise invalid(f"a message of the role {self.role} has no blocks of type {wrong}", field="content")
        return self

    def messages(self) -> list[ChatMessage]:
        if self.role == "assistant":
            return [self._assistants()]
        found: list[ChatMessage] = []
        texts: list[str] = []
        for block in self.content:
            if block.type == "text":
                texts.append(block.text or "")
                continue
            if texts:
                found.append(ChatMessage(role=self.role, content="\n".join(texts)))
                texts = []
            found.append(ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=block.content or ""))
        if texts or not found:
            found.append(ChatMessage(role=self.role, content="\n".join(texts)))
        return found

    def _assistants(self) -> ChatMessage:
        texts = [block.text or "" for block in self.content if block.type == "text"]
        thoughts = [block.thinking for block in self.content if block.thinking]
        calls = [
            {"id": block.id, "function": {"name": block.name, "arguments": orjson.dumps(block.input).decode()}}
            for block in self.content
            if block.type == "tool_use"
        ]
        content = "\n".join(texts)
        message = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "reasoning": "\n".join(thoughts) or None,
            "tool_calls": calls,
        }
        return validate(ChatMessage, message)


class MessagesTool(RequestModel):
    type: Annotated[Literal["custom"], HONOURED, BeforeValidator(_tool_type)] = "custom"
    name: Annotated[Name, HONOURED]
    description: Annotated[str | None, HONOURED] = None
    input_schema: Annotated[dict[str, Any], HONOURED, AfterValidator(object_schema)]
    strict: Annotated[
        bool, Support("without_effect", note="a schema is followed wherever tool_choice asks for a call")
    ] = False
    cache_control: Annotated[dict[str, Any] | None, WITHOUT_EFFECT] = None
    eager_input_streaming: Annotated[bool, Support("without_effect", note="input is always streamed at once")] = False
    input_examples: Annotated[list[Any], unsupported([], note="describe them in the description")] = []
    defer_loading: Annotated[bool, unsupported(False)] = False
    allowed_callers: Annotated[list[Any], unsupported(["direct"])] = ["direct"]


class MessagesToolChoice(RequestModel):
    type: Annotated[Literal["auto", "any", "tool", "none"], HONOURED]
    name: Annotated[str | None, HONOURED] = None
    disable_parallel_tool_use: Annotated[bool, HONOURED] = False

    @model_validator(mode="after")
    def _check(self) -> MessagesToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise invalid("is given exactly where the type is tool", field="name")
        return self

    def as_chats(self) -> str | NamedTool:
        if self.name is not None:
            return NamedTool(self.name)
        return "required" if self.type == "any" else self.type


class ThinkingConfig(RequestModel):
    type: Annotated[Literal["enabled", "disabled", "adaptive"], HONOURED]
    budget_tokens: Annotated[int | None, HONOURED, Field(ge=1, le=2**31 - 1)] = None
    display: Annotated[
        Literal["summarized", "omitted"] | None, Support("honoured", note="thoughts are given as they are, or not")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> ThinkingConfig:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise invalid("is given exactly where the type is enabled", field="budget_tokens")
        return self


class OutputFormat(RequestModel):
    type: Annotated[Literal["json_schema"], HONOURED]
    schema_: Annotated[dict[str, Any], HONOURED, Field(alias="schema")]


class OutputConfig(RequestModel):
    effort: Annotated[Literal["low", "medium", "high", "xhigh"] | None, HONOURED] = None
    format: Annotated[OutputFormat | None, HONOURED] = None


class CountTokensRequest(RequestModel):
    """`POST /v1/messages/count_tokens`: what of a request makes its prompt."""

    model: Annotated[str | None, HONOURED] = None
    messages: Annotated[list[InputMessage], HONOURED, Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Annotated[str | None, HONOURED, JOINED_TEXT] = None
    tools: Annotated[list[MessagesTool], HONOURED, Field(max_length=MAX_TOOLS)] = []
    tool_choice: Annotated[MessagesToolChoice | None, HONOURED] = None
    thinking: Annotated[ThinkingConfig | None, HONOURED] = None
    output_config: Annotated[OutputConfig | None, HONOURED] = None
    cache_control: Annotated[dict[str, Any] | None, WITHOUT_EFFECT] = None
    speed: Annotated[str, without_effect("standard")] = "standard"
    context_management: Annotated[Any, unsupported({"edits": []}, _KEEP_THINKING)] = None
    mcp_servers: Annotated[list[Any], unsupported([])] = []

    def chat(self) -> ChatCompletionRequest:
        """The chat that it asks for. Raises `RequestError`s."""
        return validate(ChatCompletionRequest, self._chats_fields())

    def _chats_fields(self) -> dict[str, Any]:
        messages = [] if self.system is None else [ChatMessage(role="system", content=self.system)]
        for message in self.messages:
            messages += message.messages()
        data: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "tools": [_as_chats_tool(tool) for tool in self.tools],
        }
        last = messages[-1]
        if last.role == "assistant" and last.content and not last.tool_calls:
            data["continue_final_message"] = True
        if self.tool_choice is not None:
            data["tool_choice"] = self.tool_choice.as_chats()
            data["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.thinking is not None:
            data["thinking_token_budget"] = self.thinking.budget_tokens
            data["include_reasoning"] = self.thinking.display != "omitted"
            if self.thinking.type != "adaptive":
                data["chat_template_kwargs"] = {"enable_thinking": self.thinking.type == "enabled"}
        if self.output_config is not None:
            data["reasoning_effort"] = self.output_config.effort
            if (form := self.output_config.format) is not None:
                data["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.schema_}}
        return data


class Metadata(RequestModel):
    user_id: Annotated[str | None, WITHOUT_EFFECT] = None


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, HONOURED, Field(ge=1, le=2**31 - 1)]
    stream: Annotated[bool, HONOURED] = False
    temperature: Annotated[Temperature | None, HONOURED] = None
    top_p: Annotated[PositiveFraction | None, HONOURED] = None
    top_k: Annotated[Count | None, HONOURED] = None
    stop_sequences: Annotated[list[ShortText], HONOURED, Field(max_length=MAX_STOP_STRINGS)] = []
    metadata: Annotated[Metadata | None, WITHOUT_EFFECT] = None
    service_tier: Annotated[str, without_effect("auto", "standard_only")] = "auto"
    inference_geo: Annotated[Any, unsupported()] = None
    container: Annotated[Any, unsupported(note="no tools are run here")] = None

    @model_validator(mode="after")
    def _check_budget(self) -> MessagesRequest:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise invalid(f"its budget_tokens must be less than max_tokens ({self.max_tokens})", field="thinking")
        return self

    def _chats_fields(self) -> dict[str, Any]:
        return super()._chats_fields() | {
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
        }


def _as_chats_tool(tool: MessagesTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}
