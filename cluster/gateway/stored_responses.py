"""What is kept of a tenant's responses: `GET` and `DELETE /v1/responses/{id}`, its input items, and `cancel`."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from cluster.errors import InvalidValueError, RequestError, ResponseNotFoundError, UnsupportedFieldError
from cluster.gateway.replies import JSONBytes
from cluster.gateway.response_store import StoredResponse, TenantResponses
from cluster.gateway.service import gateway_of

MAX_LISTED = 100
DEFAULT_LISTED = 20

router = APIRouter()


def _kept(request: Request) -> TenantResponses:
    return gateway_of(request).responses_of(request)


def _find(request: Request, response_id: str) -> StoredResponse:
    found = _kept(request).find(response_id)
    if found is None:
        raise _not_found(response_id)
    return found


def _not_found(response_id: str) -> ResponseNotFoundError:
    return ResponseNotFoundError(f"Response with id {response_id!r:.80} not found")


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str) -> Response:
    found = _find(request, response_id)
    if request.query_params.get("stream", "false") != "false":
        raise UnsupportedFieldError("stream: what was streamed is not kept; ask without it", param="stream")
    return Response(found.body, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    if not _kept(request).forget(response_id):
        raise _not_found(response_id)
    return JSONBytes({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> Response:
    _find(request, response_id)
    raise RequestError("only responses made with background: true can be cancelled; close the connection instead")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(request: Request, response_id: str) -> Response:
    """Those of this response alone, not of the ones that it went on from; the last one first by default."""
    items = [orjson.loads(item) for item in _find(request, response_id).input_items]
    limit = _limit(request.query_params.get("limit", str(DEFAULT_LISTED)))
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidValueError("order: must be asc or desc", param="order")
    if order == "desc":
        items.reverse()
    after = request.query_params.get("after")
    if after is not None:
        place = next((place for place, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise InvalidValueError("after: this response has no input item of that id", param="after")
        items = items[place + 1 :]
    page = items[:limit]
    return JSONBytes(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_LISTED):
        raise InvalidValueError(f"limit: must be a whole number from 1 to {MAX_LISTED}", param="limit")
    return int(text)
