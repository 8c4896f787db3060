"""The experts of an attention worker, where the controller's latest route says that they are."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch

from cluster.errors import ConfigError, PeerRefusedError
from cluster.protocol import Peer, Route
from workers.experts.backend import Pending
from workers.experts.exchange import PeerLink
from workers.experts.remote import Holders, MixedExperts, Remote, RemotePending
from workers.experts.shard import Shard
from workers.experts.wire import Patience
from workers.models.spec import ModelSpec
from workers.numerics import Numerics

log = logging.getLogger(__name__)

OPEN_PATIENCE = 3.0  # in `peer_timeout_s`: an offer, then a rendezvous


class RoutedExperts:
    """An `ExpertBackend` of links to expert workers. It keeps links whose worker stays, and opens what is new.

    `begin` and `finish` belong to one thread; everything else may be called from any.
    """

    def __init__(
        self,
        spec: ModelSpec,
        numerics: Numerics,
        peer_timeout_s: float,
        open_link: Callable[[Peer], PeerLink],
        own: Shard | None = None,
        on_change: Callable[[], None] = lambda: None,
        on_wait: Callable[[float], object] = lambda _: None,
    ) -> None:
        """`open_link` meets a peer or raises; it may block. `own` are experts that lie here.

        `on_change` is called after a route, and after each loss, on any thread; `on_wait` as `MixedExperts` does.
        """
        self._on_change = on_change
        self._open_link = open_link
        self._open_s = OPEN_PATIENCE * peer_timeout_s
        self._num_experts = spec.num_experts
        self._calls = MixedExperts(
            own or Shard(((),) * len(spec.layers), [None] * len(spec.layers)),
            self._num_experts,
            numerics,
            Patience.for_model(spec, peer_timeout_s),
            on_change,
            on_wait,
        )
        self._routing = threading.Lock()
        self._route_version = 0

    # ------------------------------------------------------------------------------------------------ as a backend

    def begin(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> RemotePending:
        """See `MixedExperts.begin`."""
        return self._calls.begin(layer, hidden, topk_ids, topk_weights)

    def finish(self, pending: Pending) -> torch.Tensor:
        """See `MixedExperts.finish`."""
        return self._calls.finish(pending)

    # -------------------------------------------------------------------------------------------------- as a subject

    @property
    def ready(self) -> bool:
        """Every expert is held by somebody whose link is up: a step can run."""
        return self._calls.is_ready

    @property
    def route_version(self) -> int:
        """Of the route in effect; 0: none yet."""
        return self._route_version

    @property
    def lost_peers(self) -> tuple[str, ...]:
        """Worker ids of the route in effect whose link broke, or could not be opened."""
        return tuple(remote.peer.worker_id for remote in self._calls.holders.remotes if remote.link is None)

    @property
    def refusal(self) -> str | None:
        """Why a worker of the route in effect takes no link from this one, where one does not."""
        return next((remote.refusal for remote in self._calls.holders.remotes if remote.refusal), None)

    def set_route(self, route: Route) -> None:
        """Take `route` in place of the one before; returns once it is in effect, within a bounded time.

        A peer that cannot be reached is one of `lost_peers`. Raises `ConfigError` for a route that does not fit the
        model; then nothing has changed.
        """
        self._check(route)
        with self._routing:
            up = {remote.peer.worker_id: remote for remote in self._calls.holders.remotes if remote.link is not None}
            fresh = self._open([peer for peer in route.peers if peer.worker_id not in up])
            remotes = [up.get(peer.worker_id) or fresh[peer.worker_id] for peer in route.peers]
            self._calls.hold(Holders(remotes, route.owners))
            self._route_version = route.version
        self._on_change()

    def close(self) -> None:
        """Tell every peer that no more calls come, and let go of them."""
        with self._routing:
            self._calls.close()

    def _check(self, route: Route) -> None:
        counts = [len(experts) for experts in route.owners]
        if counts != self._num_experts:
            raise ConfigError(
                f"route {route.version} has owners for {_few(counts)} experts by layer, and the model has "
                f"{_few(self._num_experts)}",
                param="owners",
            )
        places = {place for experts in route.owners for owners in experts for place in owners}
        if not places <= set(range(len(route.peers))):
            raise ConfigError(f"route {route.version} names places beyond its {len(route.peers)} peers", param="owners")

    def _open(self, peers: Sequence[Peer]) -> dict[str, Remote]:
        """By worker id: a link to each, tried at once; those that are not there in time are left to themselves."""
        remotes = {peer.worker_id: Remote(peer, None) for peer in peers}
        lock, is_late = threading.Lock(), False

        def open_one(remote: Remote) -> None:
            try:
                link = self._open_link(remote.peer)
            except Exception as error:  # whatever it was, the route goes on without this peer
                log.warning("expert worker %s cannot be reached: %s", remote.peer.name, error)
                if isinstance(error, PeerRefusedError):
                    remote.refusal = error.message
                return
            with lock:
                if not is_late:
                    remote.link = link
                    return
            link.close()

        threads = [
            threading.Thread(target=open_one, args=(remote,), name=f"open-{remote.peer.name}", daemon=True)
            for remote in remotes.values()
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + self._open_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        with lock:
            is_late = True
        return remotes


def _few(counts: Sequence[int]) -> str:
    return str(list(counts)) if len(counts) <= 8 else f"{list(counts[:8])} …"
