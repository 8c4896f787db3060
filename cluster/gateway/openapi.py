"""`GET /openapi.json`: the API as an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.0).

Paths are made from the routes, bodies from the request models with their `Support`; statuses and replies are told here
and in `openapi_replies.py`, and the tests hold them to what comes. Which fields may not stand together is no part of a
schema: the error says it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.routing import RouteContext, iter_route_contexts
from pydantic.json_schema import models_json_schema
from starlette.responses import Response
from starlette.routing import BaseRoute

from cluster.gateway.auth import OPEN_PATHS
from cluster.gateway.capabilities import ENDPOINTS, nested_models
from cluster.gateway.fields import RequestModel
from cluster.gateway.openapi_replies import ANTHROPIC_ERROR, ERROR, EVENT, REPLIES, Schema, ref
from cluster.gateway.replies import MESSAGES_PATH, PREDICTED_TTFT_HEADER, JSONBytes
from cluster.gateway.stored_responses import DEFAULT_LISTED, MAX_LISTED
from cluster.version import version

PATH = "/openapi.json"
STREAMED = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
OTHER_TYPES = {"/metrics": "text/plain"}  # of what is no JSON
STATUSES: dict[tuple[str, str], tuple[int, ...]] = {  # of a route's own, where they are not 200 alone
    ("POST", "/v1/responses/{response_id}/cancel"): (400, 404),
    ("GET", "/v1/responses/{response_id}"): (200, 400, 404),
    ("DELETE", "/v1/responses/{response_id}"): (200, 404),
    ("GET", "/v1/responses/{response_id}/input_items"): (200, 400, 404),
    ("GET", "/v1/models/{model_id}"): (200, 404),
    ("GET", "/health"): (200, 503),
    ("GET", "/health/ready"): (200, 503),
    ("GET", "/health/startup"): (200, 503),
    ("GET", "/ping"): (200, 503),
    ("POST", "/ping"): (200, 503),
    ("GET", "/health/generate"): (200, 503),
    ("GET", "/health_generate"): (200, 503),
    ("POST", "/admin/drain"): (202,),
    ("POST", "/admin/requests/{request_id}/abort"): (200, 404),
}
QUERIES: dict[tuple[str, str], dict[str, Schema]] = {
    ("GET", "/v1/responses/{response_id}"): {"stream": {"enum": ["false"]}},
    ("GET", "/v1/responses/{response_id}/input_items"): {
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": DEFAULT_LISTED},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string"},
    },
}
_MEANINGS = {
    200: "Done.",
    202: "Begun.",
    400: "The request is wrong; `param` names the field at fault.",
    401: "No key where one is needed, or none of this server's.",
    403: "What was shown does not open this.",
    404: "There is nothing of this name.",
    413: "The body is too large.",
    429: "As much is open as there may be; `Retry-After` says when to try again.",
    500: "A fault of the server's own.",
    503: "Not at the moment; send it again.",
    504: "The request's deadline passed.",
}
_PARAMETER = re.compile(r"{(\w+)}")


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The document of those of `routes` that are part of the API."""
    paths: dict[str, dict[str, Any]] = {}
    for route in iter_route_contexts(routes):
        if not route.include_in_schema:
            continue
        path = route.path_format
        assert path is not None, "every route that is shown has a path"
        for method in route.methods or ():
            paths.setdefault(path, {})[method.lower()] = _operation(route, method, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Foretoken",
            "version": version(),
            "description": "Mixture-of-Experts models behind the APIs of OpenAI and Anthropic.",
        },
        "paths": paths,
        "components": {
            "schemas": {**request_schemas(), "Error": ERROR, "AnthropicError": ANTHROPIC_ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"x-api-key": []}],
    }


def openapi_routes(routes: Sequence[BaseRoute]) -> APIRouter:
    """The route of the document of `routes`, which is made when it is first asked for."""
    router = APIRouter()
    made = functools.cache(lambda: JSONBytes(document(routes)).body)

    @router.get(PATH, include_in_schema=False)
    async def openapi() -> Response:
        return Response(made(), media_type="application/json")

    return router


def _operation(route: RouteContext, method: str, path: str) -> dict[str, Any]:
    statuses = sorted(_statuses(method, path))
    words = inspect.getdoc(route.endpoint) or str(route.name).replace("_", " ").capitalize()
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "summary": words.partition("\n")[0],
        "responses": {str(status): _response(method, path, status) for status in statuses},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(path)
    ]
    queries = QUERIES.get((method, path), {})
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in queries.items()]
    if parameters:
        operation["parameters"] = parameters
    if path in ENDPOINTS:
        body = {"application/json": {"schema": ref(ENDPOINTS[path].__name__)}}
        operation["requestBody"] = {"required": True, "content": body}
    if path in OPEN_PATHS:
        operation["security"] = []
    return operation


def _statuses(method: str, path: str) -> set[int]:
    found = set(STATUSES.get((method, path), (200,)))
    if path in OPEN_PATHS:
        return found
    found |= {401, 403, 429, 500}
    if path in ENDPOINTS:  # a body is read, and a place among the open requests is taken
        found |= {400, 404, 413, 503, 504}
    return found


def _response(method: str, path: str, status: int) -> dict[str, Any]:
    schema = REPLIES.get((method, path), {"type": "object"})
    content: dict[str, Any] = {}
    if status >= 400 and not (status == 503 and path.startswith(("/health", "/ping"))):
        schema = ref("AnthropicError" if path.startswith(MESSAGES_PATH) else "Error")
    elif status < 400 and path in STREAMED:
        content["text/event-stream"] = {"schema": EVENT}
    if status < 400 and path in OTHER_TYPES:
        content[OTHER_TYPES[path]] = {"schema": {"type": "string"}}
    else:
        content["application/json"] = {"schema": schema}
    described = {"description": _MEANINGS[status], "content": content}
    if status < 400 and path in STREAMED:
        described["headers"] = {
            PREDICTED_TTFT_HEADER: {
                "description": "milliseconds from the request's arrival until its first token was predicted to come",
                "schema": {"type": "number", "minimum": 0},
            }
        }
    return described


def request_schemas() -> dict[str, Schema]:
    """The schemas of all request models, by the models' names: what is refused in each is left out."""
    models = {model.__name__: model for model in _with_nested(ENDPOINTS.values())}
    _, found = models_json_schema(
        [(model, "validation") for model in models.values()], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Schema] = found["$defs"]
    for name, model in models.items():
        _keep_honoured(schemas[name], model)
    return schemas


def _with_nested(models: Iterable[type[RequestModel]]) -> Iterator[type[RequestModel]]:
    for model in models:
        yield model
        for field in model.model_fields.values():
            yield from _with_nested(part for part, _ in nested_models(field.annotation))


def _keep_honoured(schema: Schema, model: type[RequestModel]) -> None:
    """Make `schema` say of `model` what it lets through; null is absence."""
    properties, required = schema["properties"], schema.get("required", ())
    for name, support in model.supports.items():
        if support.accepted is not None:
            properties[name] = {"enum": [*support.accepted, None]}
        elif support.status == "unsupported":
            properties[name] = {"type": "null"}
        elif name not in required and {"type": "null"} not in properties[name].get("anyOf", ()):
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        if support.note:
            properties[name]["description"] = support.note
