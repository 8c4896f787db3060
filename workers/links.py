"""How tensor links come about: an expert worker offers them, an attention worker opens them.

Each tells the other where it listens in the authenticated call `OpenLink` and its answer, and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import msgspec

from cluster.channel import CHANNEL_OPTIONS, REFUSALS, call_metadata
from cluster.errors import ForetokenError, PeerLostError, PeerRefusedError
from cluster.protocol import LINK_METHOD, EngineState, Launch, Likeness, LinkOffer, OpenLink, Peer
from workers.experts.exchange import LinkClient, LinkServer, Meeting, PeerLink
from workers.experts.host import ExpertHost

log = logging.getLogger(__name__)

MAX_PENDING_LINKS = 16  # offered, and nobody has come yet
MAX_ID_BYTES = 128
MAX_ADDRESS_BYTES = 4096

_encode = msgspec.msgpack.Encoder().encode
_decode_open_link = msgspec.msgpack.Decoder(OpenLink).decode
_decode_offer = msgspec.msgpack.Decoder(LinkOffer).decode


def link_opener(launch: Launch, likeness: Likeness) -> Callable[[Peer], PeerLink]:
    """How this attention worker opens a link to an expert worker: within `peer_timeout_s` three times, on a thread."""
    links = LinkClient(launch.tensor_host, launch.peer_timeout_s)

    def open_link(peer: Peer) -> PeerLink:
        """Raises `PeerLostError`, of which `PeerRefusedError` where the expert worker takes no link from this one."""
        link_id = uuid.uuid4().hex

        def exchange(address: bytes) -> bytes:
            request = OpenLink(
                link_id=link_id,
                from_name=launch.name,
                likeness=likeness,
                address=address,
                worker_id=peer.worker_id,
            )
            try:
                with grpc.insecure_channel(peer.address, options=CHANNEL_OPTIONS) as channel:
                    body = channel.unary_unary(LINK_METHOD)(
                        _encode(request), timeout=launch.peer_timeout_s, metadata=call_metadata(launch.token)
                    )
                return _decode_offer(body).address
            except grpc.RpcError as error:
                kind = PeerRefusedError if error.code() in REFUSALS else PeerLostError
                raise kind(f"{peer.name} at {peer.address} offers no link: {error.details()}") from error
            except msgspec.DecodeError as error:
                raise PeerLostError(f"{peer.name} at {peer.address} offers no link: {error}") from error

        return links.connect(link_id, exchange)

    return open_link


def difference(ours: Likeness, theirs: Likeness) -> str | None:
    """How `theirs` differs where it matters, in words; None: not at all."""
    fields = ("checkpoint", "dtype", "numerics") + (("arithmetic",) if ours.numerics == "invariant" else ())
    pairs = [(field, getattr(ours, field), getattr(theirs, field)) for field in fields]
    return ", ".join(f"{field} {b!r} instead of {a!r}" for field, a, b in pairs if a != b) or None


class ExpertService:
    """Offers links and serves each on a thread of its own. Lives on the event loop."""

    def __init__(self, host: ExpertHost, likeness: Likeness, links: LinkServer, worker_id: str) -> None:
        """`likeness`: what the experts of `host` are computed from and with."""
        self._host = host
        self._likeness = likeness
        self._links = links
        self._worker_id = worker_id
        self._lock = threading.Lock()
        self._num_pending = 0
        self._num_open = 0
        self._draining = False

    def handlers(self) -> Mapping[str, Any]:
        return {"OpenLink": grpc.unary_unary_rpc_method_handler(self.open_link, response_serializer=_encode)}

    def start(self) -> None:
        """Links begin with a call: nothing runs before."""

    async def close(self) -> None:
        """Open links break with the process, which their peers see at once."""

    def drain(self) -> None:
        """Offer no more links; those that are open go on."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """No link is open, and none is about to be."""
        with self._lock:
            return not self._num_pending and not self._num_open

    def state(self) -> EngineState:
        host = self._host
        return EngineState(
            worker_id=self._worker_id, expert_calls=host.num_calls, expert_rows=host.num_rows, expert_s=host.computing_s
        )

    async def open_link(self, body: bytes, context: Any) -> LinkOffer:
        try:
            request = _decode_open_link(body)
        except msgspec.DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"this is no OpenLink: {error}")
            raise
        if not 0 < len(request.link_id.encode()) <= MAX_ID_BYTES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"link_id must have 1 to {MAX_ID_BYTES} bytes")
        if not 0 < len(request.address) <= MAX_ADDRESS_BYTES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"address must have 1 to {MAX_ADDRESS_BYTES} bytes")
        if request.worker_id not in ("", self._worker_id):
            text = f"worker {request.worker_id} is not here any more; this is {self._worker_id}"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        if (unlike := difference(self._likeness, request.likeness)) is not None:
            text = (
                f"{request.from_name} has {unlike} here: give all workers one checkpoint and, in the class invariant, "
                "like machines with as many threads (or run in the class fast)"
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker is shutting down")
        with self._lock:
            is_full = self._num_pending >= MAX_PENDING_LINKS
            if not is_full:
                self._num_pending += 1
        if is_full:
            text = f"{MAX_PENDING_LINKS} links wait for their peers already; try again"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        meeting = self._links.meet(request.link_id, request.address)
        threading.Thread(target=self._serve, args=(request, meeting), name="link", daemon=True).start()
        try:
            return LinkOffer(address=await asyncio.to_thread(meeting.address))
        except PeerLostError as error:
            await context.abort(grpc.StatusCode.INTERNAL, error.message)
            raise

    def _serve(self, request: OpenLink, meeting: Meeting) -> None:
        """A link's thread: wait for the peer, then serve it until it is done, or lost."""
        link: PeerLink | None = None
        try:
            try:
                link = meeting.link()
            finally:
                with self._lock:
                    self._num_pending -= 1
                    self._num_open += link is not None
            log.info("a link from %r is open", request.from_name)
            self._host.serve(link)
            log.info("the link from %r is closed", request.from_name)
        except ForetokenError as error:
            log.warning("the link from %r ends: %s", request.from_name, error.message)
        except Exception as error:
            log.error("the link from %r ends: %s: %s", request.from_name, type(error).__name__, error)
        finally:
            if link is not None:
                link.close()
                with self._lock:
                    self._num_open -= 1
