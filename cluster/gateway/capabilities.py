"""`GET /v1/capabilities`: for each field of a request, whether it is honoured. Made from the request models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from cluster.gateway.anthropic import CountTokensRequest, MessagesRequest
from cluster.gateway.embeddings import EmbeddingRequest
from cluster.gateway.fields import RequestModel
from cluster.gateway.openai import ChatCompletionRequest, CompletionRequest
from cluster.gateway.responses import ResponsesRequest
from cluster.gateway.tokenizing import DetokenizeRequest, TokenizeRequest

ENDPOINTS: dict[str, type[RequestModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/v1/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
}


def capabilities(model_name: str) -> dict[str, Any]:
    return {
        "object": "capabilities",
        "model": model_name,
        "unknown_fields": "refused",
        "endpoints": {path: {"method": "POST", "fields": fields(model)} for path, model in ENDPOINTS.items()},
    }


def fields(model: type[RequestModel], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Each field by its JSON path (`stream_options.include_usage`, `messages[].role`)."""
    properties = model.model_json_schema()["properties"]
    described: dict[str, dict[str, Any]] = {}
    for name, support in model.supports.items():
        entry: dict[str, Any] = {"support": support.status}
        if support.accepted is not None:
            entry["accepted"] = list(support.accepted)
        if support.note:
            entry["note"] = support.note
        if support.status != "unsupported":
            entry |= _schema(properties[name])
        described[prefix + name] = entry
    for name, field in model.model_fields.items():
        for part, is_list in nested_models(field.annotation):
            entry = described[prefix + (field.alias or name)]
            for key in ("anyOf", "$ref", "items"):
                entry.pop(key, None)
            entry["type"] = "array" if is_list else "object"
            described |= fields(part, f"{prefix}{field.alias or name}{'[]' if is_list else ''}.")
    return described


def _schema(found: dict[str, Any]) -> dict[str, Any]:
    """A field's JSON schema without what says nothing here: its title, its default, and that null is absence."""
    schema = {key: value for key, value in found.items() if key not in ("title", "default")}
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema = kinds[0] | schema
    return schema


def nested_models(annotation: Any) -> Iterator[tuple[type[RequestModel], bool]]:
    """The request models inside an annotation, and whether in a list."""
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        yield annotation, False
    for argument in get_args(annotation):
        for part, is_list in nested_models(argument):
            yield part, is_list or getattr(annotation, "__origin__", None) is list
