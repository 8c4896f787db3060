"""What replies look like, as JSON schemas of `GET /openapi.json`: the members that a reader may count on."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
OPTIONAL_TEXT: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
TIME: Schema = {"type": "integer", "description": "seconds since 1970"}
NUMBER: Schema = {"type": "number"}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def const(value: str | bool) -> Schema:
    return {"const": value}


def members(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """An object that has these members, and may have more."""
    return {"type": "object", "required": list(required), "properties": required | (optional or {})}


ERROR = members(error=members(message=TEXT, type=TEXT, param=OPTIONAL_TEXT, code=TEXT))
ANTHROPIC_ERROR = members(type=const("error"), error=members(type=TEXT, message=TEXT), request_id=OPTIONAL_TEXT)

EVENT = members({"event": TEXT}, data=TEXT)  # one of a stream

_USAGE = members(
    prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT, prompt_tokens_details=members(cached_tokens=COUNT)
)
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls", None]}
_CALL = members(id=TEXT, type=const("function"), function=members(name=TEXT, arguments=TEXT))
_MESSAGE = members(
    {"reasoning": TEXT, "reasoning_content": TEXT, "tool_calls": list_of(_CALL)},
    role=const("assistant"),
    content=OPTIONAL_TEXT,
)
_MODEL = members(
    id=TEXT, object=const("model"), created=TIME, owned_by=TEXT, max_model_len={"type": ["integer", "null"]}
)
_STATUS = members({"reason": TEXT}, status=TEXT)
_TOKENS = members(
    count=COUNT,
    max_model_len={"type": ["integer", "null"]},
    tokens=list_of(COUNT),
    token_strs={"type": ["array", "null"], "items": TEXT},
)
_RESPONSE = members(
    id=TEXT,
    object=const("response"),
    created_at=TIME,
    status={"enum": ["completed", "incomplete", "in_progress", "failed"]},
    model=TEXT,
    output=list_of(members(id=TEXT, type=TEXT)),
)

REPLIES: dict[tuple[str, str], Schema] = {  # of a request that went well, by method and path
    ("POST", "/v1/completions"): members(
        id=TEXT,
        object=const("text_completion"),
        created=TIME,
        model=TEXT,
        choices=list_of(members(index=COUNT, text=TEXT, finish_reason=_FINISH)),
        usage=_USAGE,
    ),
    ("POST", "/v1/chat/completions"): members(
        id=TEXT,
        object=const("chat.completion"),
        created=TIME,
        model=TEXT,
        choices=list_of(members(index=COUNT, message=_MESSAGE, finish_reason=_FINISH)),
        usage=_USAGE,
    ),
    ("POST", "/v1/responses"): _RESPONSE,
    ("GET", "/v1/responses/{response_id}"): _RESPONSE,
    ("DELETE", "/v1/responses/{response_id}"): members(id=TEXT, object=const("response"), deleted=const(True)),
    ("GET", "/v1/responses/{response_id}/input_items"): members(
        object=const("list"), data=list_of(members(id=TEXT, type=TEXT)), has_more={"type": "boolean"}
    ),
    ("POST", "/v1/messages"): members(
        id=TEXT,
        type=const("message"),
        role=const("assistant"),
        model=TEXT,
        content=list_of(members(type=TEXT)),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        usage=members(input_tokens=COUNT, output_tokens=COUNT),
    ),
    ("POST", "/v1/messages/count_tokens"): members(input_tokens=COUNT),
    ("GET", "/v1/models"): members(object=const("list"), data=list_of(_MODEL)),
    ("GET", "/v1/models/{model_id}"): _MODEL,
    ("GET", "/v1/capabilities"): members(object=const("capabilities"), model=TEXT, endpoints={"type": "object"}),
    ("GET", "/health"): _STATUS,
    ("GET", "/health/live"): _STATUS,
    ("GET", "/health/ready"): _STATUS,
    ("GET", "/health/startup"): _STATUS,
    ("GET", "/ping"): _STATUS,
    ("POST", "/ping"): _STATUS,
    ("GET", "/health/generate"): _STATUS,
    ("GET", "/health_generate"): _STATUS,
    ("GET", "/version"): members(version=TEXT),
    ("POST", "/v1/embeddings"): members(
        id=TEXT,
        object=const("list"),
        data=list_of(members(object=const("embedding"), index=COUNT, embedding={"anyOf": [TEXT, list_of(NUMBER)]})),
        model=TEXT,
        usage=members(prompt_tokens=COUNT, total_tokens=COUNT, prompt_tokens_details=members(cached_tokens=COUNT)),
    ),
    ("POST", "/tokenize"): _TOKENS,
    ("POST", "/v1/tokenize"): _TOKENS,
    ("POST", "/detokenize"): members(prompt=TEXT),
    ("POST", "/v1/detokenize"): members(prompt=TEXT),
    ("GET", "/cluster"): members(
        model=TEXT, nodes=list_of(members(node_id=TEXT)), workers=list_of(members(name=TEXT, condition=TEXT))
    ),
    ("POST", "/admin/drain"): members(status=const("draining"), open_requests=COUNT, drain_timeout_s=NUMBER),
    ("GET", "/admin/requests"): members(object=const("list"), data=list_of(members(id=TEXT, age_s=NUMBER, state=TEXT))),
    ("POST", "/admin/requests/{request_id}/abort"): members(aborted=COUNT, id=TEXT),
}
