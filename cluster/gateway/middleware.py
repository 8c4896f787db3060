"""Around every request: its id, one log line without its content, a count, its API's shape for any error, and the gate
that lets in who has a key.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import AuthenticationError, ForetokenError, OverloadedError
from cluster.gateway.auth import OPEN_PATHS, Keys, admit
from cluster.gateway.login import login_form
from cluster.gateway.replies import as_foretoken_error, error_response, is_anthropics
from cluster.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET = frozenset({"/cluster"})  # an open page asks every second
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """Pure ASGI: a token's event passes through one small function."""

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_anthropics(scope):
                    headers["request-id"] = request_id  # where Anthropic's clients look
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status:
                raise
            await error_response(as_foretoken_error(error), scope)(scope, receive, send_with_id)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.answered(method, _route(scope), status)
            logger.log(
                logging.DEBUG if scope["path"] in _QUIET else logging.INFO,
                "%s %.200r %d in %.1f ms, request %s",
                method,
                scope["path"],
                status,
                (time.perf_counter() - started) * 1e3,
                request_id,
                extra={"request_id": request_id, "status": status, **_tenant(scope)},
            )


def _tenant(scope: Scope) -> dict[str, str]:
    tenant: str = scope["state"].get("tenant", "")
    return {"tenant": tenant} if tenant else {}


class Gate:
    """Refuses who has no key where one is needed, before anything of a request but its head is looked at."""

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: GatewayMetrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        try:
            if scope.get("state", {}).get("is_surplus") and scope["path"] not in OPEN_PATHS:
                raise OverloadedError("as many connections are open as there may be", retry_after_s=1.0)
            caller = admit(self._keys, scope)
        except ForetokenError as error:
            self._metrics.failed(error.code)
            await _refusal(error, scope)(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = caller.tenant
        await self._app(scope, receive, send)


def _refusal(error: ForetokenError, scope: Scope) -> Response:
    if not isinstance(error, AuthenticationError):
        return error_response(error, scope)
    if scope["path"] == "/" and scope["method"] == "GET" and "text/html" in Headers(scope=scope).get("accept", ""):
        return login_form()
    response = error_response(error, scope)
    response.headers["www-authenticate"] = "Bearer"
    return response


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "other")
