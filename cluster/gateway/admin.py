"""What an operator may do: see which requests are open, end one, and let the server drain. Nothing shows content."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from cluster.errors import AbortedError, RequestNotFoundError
from cluster.gateway.auth import ADMIN_PATH
from cluster.gateway.limits import Place
from cluster.gateway.replies import JSONBytes
from cluster.gateway.service import gateway_of

router = APIRouter(prefix=ADMIN_PATH)


@router.post("/drain")
async def drain(request: Request) -> Response:
    """Admit nothing more. What runs may finish for `drain_timeout_s`; the process stays until it is told to end."""
    gateway = gateway_of(request)
    gateway.begin_drain()
    body = {
        "status": "draining",
        "open_requests": gateway.admission.num_open,
        "drain_timeout_s": gateway.settings.drain_timeout_s,
    }
    return JSONBytes(body, status=202)


@router.get("/requests")
async def requests(request: Request) -> Response:
    """The open requests, the oldest first."""
    return JSONBytes({"object": "list", "data": [_shown(place) for place in gateway_of(request).admission.places]})


@router.post("/requests/{request_id}/abort")
async def abort(request: Request, request_id: str) -> Response:
    """End the open requests with this id, of which there may be several: a client may choose it (`x-request-id`)."""
    found = [place for place in gateway_of(request).admission.places if place.request_id == request_id]
    if not found:
        raise RequestNotFoundError(f"no request {request_id!r:.130} is open", param="request_id")
    for place in found:
        place.abort(AbortedError("an administrator ended this request; do not send it again as it is"))
    return JSONBytes({"aborted": len(found), "id": request_id})


def _shown(place: Place) -> dict[str, Any]:
    return {
        "id": place.request_id,
        "tenant": place.tenant or None,
        "age_s": round(time.monotonic() - place.began, 3),
        "state": place.state,
        "held_bytes": place.held_bytes,
        "prompt_tokens": place.num_prompt_tokens,
        "generated_tokens": 0 if place.generation is None else place.generation.num_tokens,
    }
