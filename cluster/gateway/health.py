"""Whether the server lives, takes requests, has been up, and really generates; and which release it is.

The cheap questions are open to anybody. The deep one costs a step of a worker: it needs a key like any generation,
runs once at a time, and who asks again within `FRESH_S` is told what was found.
"""

from __future__ import annotations

import asyncio
import time
import uuid

from fastapi import APIRouter, Request, Response

from cluster.errors import ForetokenError
from cluster.gateway.generation import Unobserved
from cluster.gateway.replies import JSONBytes
from cluster.gateway.service import Gateway, gateway_of
from cluster.gateway.status import STATE_TIMEOUT_S
from cluster.protocol import EngineState, Sampling, Stopping, Submit
from cluster.version import version

DEADLINE_S = 10.0  # for one token
FRESH_S = 5.0
SOONEST = -(2**31)  # before all who wait

router = APIRouter()


class GenerationCheck:
    """Lets a worker generate one token, now and then."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._lock = asyncio.Lock()
        self._found_at = float("-inf")
        self._reason: str | None = None

    async def look(self) -> str | None:
        """Why no token comes, in words; None: one came."""
        async with self._lock:
            if time.monotonic() - self._found_at >= FRESH_S:
                self._reason = await self._generate()
                self._found_at = time.monotonic()
            return self._reason

    async def _generate(self) -> str | None:
        if (reason := not_ready(self._gateway)) is not None:
            return reason
        pool = self._gateway.pool
        before = await pool.states(STATE_TIMEOUT_S)
        submit = Submit(
            request_id=f"health-{uuid.uuid4().hex}",
            prompt_ids=(0,),
            sampling=Sampling(seed=0, temperature=0.0),
            stopping=Stopping(max_tokens=1),
            priority=SOONEST,
            deadline_s=DEADLINE_S,
        )
        try:
            # it is nobody's request, and counts in no metric of requests
            with pool.submit([submit], timeout_s=DEADLINE_S, observer=Unobserved()) as generation:
                while await generation.read():
                    pass
        except ForetokenError as error:
            # All places of a batch may be taken for longer than that, by others' requests that do well.
            return None if _has_generated(before, await pool.states(STATE_TIMEOUT_S)) else error.message
        return None


def _has_generated(before: dict[str, EngineState], after: dict[str, EngineState]) -> bool:
    """Whether a worker, by name, has generated anything in between; another process of its name counts anew."""

    def tokens_before(name: str, worker_id: str) -> int:
        state = before.get(name)
        return state.generated_tokens if state is not None and state.worker_id == worker_id else 0

    return any(state.generated_tokens > tokens_before(name, state.worker_id) for name, state in after.items())


def not_ready(gateway: Gateway) -> str | None:
    """Why new requests would not run, in words; None: they will."""
    if gateway.admission.draining:
        return "draining"
    if gateway.pool.hello is None:
        return f"no worker: {gateway.pool.last_failure}"
    return None


def _answer(reason: str | None) -> Response:
    if reason is None:
        return JSONBytes({"status": "ok"})
    return JSONBytes({"status": "unavailable", "reason": reason}, status=503)


@router.get("/health/live")
async def live() -> Response:
    """The process answers; also while it drains."""
    return _answer(None)


@router.get("/health")
@router.get("/health/ready")
@router.get("/ping")
@router.post("/ping")
async def ready(request: Request) -> Response:
    """New requests are taken and will run."""
    return _answer(not_ready(gateway_of(request)))


@router.get("/health/startup")
async def startup(request: Request) -> Response:
    """A worker has been up once."""
    pool = gateway_of(request).pool
    return _answer(None if pool.num_connections else f"no worker yet: {pool.last_failure}")


@router.get("/health/generate")
@router.get("/health_generate")
async def generate(request: Request) -> Response:
    """A worker generates a token. Needs a key, where others do."""
    check: GenerationCheck = request.app.state.generation_check
    return _answer(await check.look())


@router.get("/version")
async def tell_version() -> Response:
    """The release that is installed."""
    return JSONBytes({"version": version()})
