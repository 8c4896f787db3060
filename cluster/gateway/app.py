"""The routes, and the application that has them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import iter_route_contexts
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from starlette.exceptions import HTTPException

from cluster.errors import ForetokenError
from cluster.gateway import admin, embeddings, health, stored_responses, tokenizing
from cluster.gateway.capabilities import capabilities
from cluster.gateway.dashboard import page_routes
from cluster.gateway.dialects.messages import TokenCounts
from cluster.gateway.exposition import exposition
from cluster.gateway.login import login_routes
from cluster.gateway.middleware import Gate, RequestContext
from cluster.gateway.openapi import openapi_routes
from cluster.gateway.pool import WorkerPool
from cluster.gateway.replies import JSONBytes, anthropic_error, error_response, is_anthropics, openai_error
from cluster.gateway.service import Gateway, gateway_of, model_not_found
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.status import PoolStatus, StatusSource, cluster_body
from cluster.gateway.tracing import NO_TRACING, Tracing

router = APIRouter()


def create_app(
    settings: GatewaySettings, pool: WorkerPool, status: StatusSource | None = None, tracing: Tracing = NO_TRACING
) -> FastAPI:
    """The gateway as an ASGI application. `app.state.gateway.begin_drain()` is for the server's signal handler.

    `status`: where the page's numbers come from; None: from the workers of `pool`. Raises `CheckpointError` where the
    tokenizer's files cannot be used.
    """
    status = PoolStatus(pool, settings.served_name) if status is None else status
    gateway = Gateway(settings, pool, status, CollectorRegistry(), tracing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pool.start()
        yield
        await gateway.close()

    app = FastAPI(
        title="Foretoken", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.gateway = gateway
    app.state.generation_check = health.GenerationCheck(gateway)
    app.include_router(router)
    app.include_router(embeddings.router)
    app.include_router(tokenizing.router)
    app.include_router(health.router)
    app.include_router(page_routes(), include_in_schema=False)
    app.include_router(admin.router)
    app.include_router(stored_responses.router)
    app.include_router(login_routes(settings.keys))
    app.include_router(openapi_routes(app.routes))
    app.add_exception_handler(ForetokenError, _refuse)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Gate, keys=settings.keys, metrics=gateway.metrics)
    app.add_middleware(RequestContext, metrics=gateway.metrics)  # the last one added is around the others
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ForetokenError)
    gateway_of(request).metrics.failed(error.code)
    return error_response(error, request.scope)


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own refusals: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{error.detail}: {request.method:.20} {request.url.path:.200}"
    body = openai_error(message, kind="invalid_request_error", code=code)
    if is_anthropics(request.scope):
        body = anthropic_error(message, error.status_code, request.state.request_id)
    headers = {"allow": _methods(request)} if error.status_code == 405 else error.headers
    return JSONBytes(body, status=error.status_code, headers=headers)


def _methods(request: Request) -> str:
    """All methods of a path: the router names those of the first route there alone."""
    found: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        if route.path_regex.match(request.url.path):
            found |= route.methods or set()
    return ", ".join(sorted(found))


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    return await gateway_of(request).reply(request, gateway_of(request).completions)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    return await gateway_of(request).reply(request, gateway_of(request).chat_completions)


@router.post("/v1/responses")
async def responses(request: Request) -> Response:
    return await gateway_of(request).reply(request, gateway_of(request).responses(request))


@router.post("/v1/messages")
async def messages(request: Request) -> Response:
    return await gateway_of(request).reply(request, gateway_of(request).messages)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    return await gateway_of(request).count_tokens(request, TokenCounts())


@router.get("/v1/models")
async def models(request: Request) -> Response:
    return JSONBytes({"object": "list", "data": [_model(gateway_of(request))]})


@router.get("/v1/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    gateway = gateway_of(request)
    if model_id != gateway.settings.served_name:
        raise model_not_found(model_id, gateway.settings.served_name)
    return JSONBytes(_model(gateway))


def _model(gateway: Gateway) -> dict[str, Any]:
    hello = gateway.pool.hello
    return {
        "id": gateway.settings.served_name,
        "object": "model",
        "created": gateway.created,
        "owned_by": "foretoken",
        "max_model_len": None if hello is None else hello.max_model_len,
    }


@router.get("/v1/capabilities")
async def list_capabilities(request: Request) -> Response:
    return JSONBytes(capabilities(gateway_of(request).settings.served_name))


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(await exposition(gateway_of(request)), media_type=CONTENT_TYPE_LATEST)


@router.get("/cluster")
async def cluster(request: Request) -> Response:
    """What the page at ``/`` shows."""
    gateway = gateway_of(request)
    body = cluster_body(
        await gateway.status.look(),
        gateway.pool,
        model=gateway.settings.served_name,
        num_open=gateway.admission.num_open,
        is_draining=gateway.admission.draining,
        latency=gateway.recent.body(),
        needs_key=bool(gateway.settings.keys.users),
    )
    return JSONBytes(body, headers={"cache-control": "no-store"})
