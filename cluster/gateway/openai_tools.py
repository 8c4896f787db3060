"""Tools in a chat's request: what the model may call, what it must, and the calls that it made before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, Field, StringConstraints

from cluster.gateway.fields import HONOURED, WITHOUT_EFFECT, RequestModel, Support, invalid, not_honoured

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def object_schema(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type", "object") != "object":
        raise invalid('must be a JSON schema of type "object": a tool takes its arguments by name')
    return value


def _object_text(value: str) -> str:
    try:
        found = orjson.loads(value or "{}")
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise invalid("must be the text of a JSON object")
    return value or "{}"


ObjectText = Annotated[str, AfterValidator(_object_text)]


class FunctionDefinition(RequestModel):
    name: Annotated[Name, HONOURED]
    description: Annotated[str | None, HONOURED] = None
    parameters: Annotated[dict[str, Any] | None, HONOURED, AfterValidator(object_schema)] = None
    strict: Annotated[
        bool, Support("without_effect", note="a schema is followed wherever tool_choice asks for a call")
    ] = False


class Tool(RequestModel):
    type: Annotated[Literal["function"], HONOURED]
    function: Annotated[FunctionDefinition, HONOURED]

    def for_template(self) -> dict[str, Any]:
        """As transformers' templates read it: what was given, in the usual order."""
        given = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": given}


class CalledFunction(RequestModel):
    name: Annotated[Name, HONOURED]
    arguments: Annotated[ObjectText, HONOURED]


class MadeCall(RequestModel):
    """A call in a message of the assistant's."""

    id: Annotated[str | None, HONOURED] = None
    type: Annotated[Literal["function"], HONOURED] = "function"
    function: Annotated[CalledFunction, HONOURED]
    index: Annotated[int | None, WITHOUT_EFFECT] = None  # as streams have it: their order is that of the list

    def for_template(self) -> dict[str, Any]:
        """As transformers' templates read it: the arguments are an object."""
        function = {"name": self.function.name, "arguments": orjson.loads(self.function.arguments)}
        call: dict[str, Any] = {"type": self.type, "function": function}
        return call if self.id is None else {"id": self.id, **call}


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The one tool that must be called."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            },
            "required": ["type", "function"],
        },
    ]
}


def read_tool_choice(value: Any) -> ToolChoice:
    """For a validator: none, auto, required, or the one function's name."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value  # type: ignore[return-value]
    if isinstance(value, NamedTool):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "allowed_tools":
        raise not_honoured("a choice of type 'allowed_tools' is not supported: give only the allowed ones as tools")
    if isinstance(kind, str) and kind != "function":
        raise not_honoured(f"a choice of type {kind!r:.40} is not supported: tools are functions")
    function = value.get("function") if kind == "function" and set(value) == {"type", "function"} else None
    if not isinstance(function, dict) or set(function) != {"name"} or not isinstance(function["name"], str):
        raise invalid(
            'must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}',
        )
    return NamedTool(function["name"])


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
MadeCalls = Annotated[list[MadeCall], Field(max_length=MAX_CALLS)]
