"""Routes: which links are opened, kept and closed, and where rows go when one breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from cluster.errors import ConfigError, PeerLostError, PeerRefusedError
from cluster.protocol import Peer
from tests.support.experts import FaultyLink, experts_of, make_host, make_route, serve_in_thread
from tests.support.models import TINY, random_weights
from tests.support.numerics import numerics
from workers.experts.backend import LocalExperts
from workers.experts.exchange import PeerLink
from workers.experts.frame import TensorSpec
from workers.experts.routed import RoutedExperts

WEIGHTS = random_weights(TINY)
BLOCKS = numerics("blocks")
EVEN, ODD, ALL = (0, 2, 4, 6), (1, 3, 5, 7), tuple(range(8))
Fails = Callable[[str, int], bool]


class Peers:
    """Expert workers on threads. `fails` says when a worker's links break; `down` who cannot be reached."""

    def __init__(self, held: Mapping[str, Sequence[int]], fails: Mapping[str, Fails] | None = None) -> None:
        self._hosts = {name: make_host(TINY, WEIGHTS, BLOCKS, ids) for name, ids in held.items()}
        self._fails = fails or {}
        self.down: set[str] = set()
        self.unlike: set[str] = set()
        self.opened: list[str] = []
        self.links: dict[str, FaultyLink] = {}

    def open_link(self, peer: Peer) -> PeerLink:
        self.opened.append(peer.worker_id)
        if peer.worker_id in self.down:
            raise PeerLostError("nobody is there")
        if peer.worker_id in self.unlike:
            raise PeerRefusedError(f"{peer.worker_id} computes another model")
        link = FaultyLink(
            serve_in_thread(self._hosts[peer.worker_id]), self._fails.get(peer.worker_id, lambda *_: False)
        )
        self.links[peer.worker_id] = link
        return link

    def experts(self, on_change: Callable[[], None] = lambda: None) -> RoutedExperts:
        return RoutedExperts(TINY, BLOCKS, 30.0, self.open_link, on_change=on_change)


INPUTS = torch.Generator().manual_seed(5)
HIDDEN = torch.randn(9, TINY.hidden, generator=INPUTS)
TOPK_IDS = torch.rand(9, 8, generator=INPUTS).argsort(dim=1)[:, :2].contiguous()
TOPK_WEIGHTS = torch.rand(9, 2, generator=INPUTS)


def call(experts: RoutedExperts | LocalExperts, layer: int = 0) -> torch.Tensor:
    return experts.finish(experts.begin(layer, HIDDEN, TOPK_IDS, TOPK_WEIGHTS))


EXPECTED = call(LocalExperts(experts_of(WEIGHTS), BLOCKS))


def test_links_are_kept_while_their_worker_stays() -> None:
    peers = Peers({"a": EVEN, "b": ODD, "c": ODD})
    experts = peers.experts()
    experts.set_route(make_route(1, TINY, {"a": EVEN, "b": ODD}))
    assert sorted(peers.opened) == ["a", "b"]
    experts.set_route(make_route(7, TINY, {"c": ODD, "a": EVEN}))
    assert peers.opened[2:] == ["c"]
    assert experts.route_version == 7
    with pytest.raises(PeerLostError):
        peers.links["b"].recv([TensorSpec((1,))], 1.0)  # closed
    assert torch.equal(call(experts), EXPECTED)


def test_without_a_route_nothing_is_ready_and_a_call_says_so() -> None:
    experts = Peers({}).experts()
    assert (experts.ready, experts.route_version, experts.lost_peers) == (False, 0, ())
    with pytest.raises(PeerLostError, match="layer 0"):
        call(experts)


@pytest.mark.parametrize("what", ["send", "recv"])
def test_rows_of_a_lost_worker_go_to_the_next_holder_in_the_same_call(what: str) -> None:
    held = {"a": EVEN, "b": ODD, "c": ALL, "d": EVEN}
    fails = {"a": lambda kind, number: (kind, number) == (what, 1), "c": lambda kind, _: kind == what}
    peers = Peers(held, fails)
    experts = peers.experts()
    experts.set_route(make_route(1, TINY, held))
    assert torch.equal(call(experts), EXPECTED)
    assert torch.equal(call(experts), EXPECTED)  # a is lost, and c in its place, and d computes
    assert experts.lost_peers == ("a", "c")
    assert experts.ready
    assert torch.equal(call(experts, 0), EXPECTED)


@pytest.mark.parametrize("what", ["send", "recv"])
def test_where_nobody_is_left_the_other_links_stay_in_step(what: str) -> None:
    held = {"a": EVEN, "b": ODD}
    peers = Peers({**held, "c": EVEN}, {"a": lambda kind, number: kind == what and number == 0})
    experts = peers.experts()
    experts.set_route(make_route(1, TINY, held))
    with pytest.raises(PeerLostError, match=r"experts \[.*\] of layer 0"):
        call(experts)
    assert not experts.ready
    experts.set_route(make_route(2, TINY, held))
    assert peers.opened.count("a") == 2
    assert peers.opened.count("b") == 1, "it was healthy all along"
    with pytest.raises(PeerLostError):
        call(experts)  # the new link breaks as well
    experts.set_route(make_route(3, TINY, {"b": ODD, "c": EVEN}))
    assert torch.equal(call(experts), EXPECTED)


def test_a_worker_that_lacks_an_expert_is_passed_over_for_it_alone() -> None:
    peers = Peers({"a": (0, 2, 4), "b": ODD, "c": EVEN})
    said = {"a": EVEN, "b": ODD, "c": EVEN}
    experts = peers.experts()
    experts.set_route(make_route(1, TINY, said))
    assert torch.equal(call(experts), EXPECTED)
    assert (experts.ready, experts.lost_peers) == (True, ())
    experts.set_route(make_route(2, TINY, {"a": EVEN, "b": ODD}))
    with pytest.raises(PeerLostError, match=r"experts \[6\]"):
        call(experts)
    assert (experts.ready, experts.lost_peers) == (False, ())
    experts.set_route(make_route(3, TINY, said))
    assert torch.equal(call(experts), EXPECTED)


def test_a_call_that_was_broken_off_puts_no_later_one_out_of_step() -> None:
    held = {"a": EVEN, "b": ODD, "c": ALL}
    experts = Peers(held).experts()
    experts.set_route(make_route(1, TINY, held))
    experts.begin(2, HIDDEN * 2, TOPK_IDS, TOPK_WEIGHTS)  # and what runs beside it raised
    assert torch.equal(call(experts), EXPECTED)
    assert experts.lost_peers == ("a", "b")


def test_a_route_given_within_a_call_leaves_that_call_its_links() -> None:
    peers = Peers({"a": ALL, "b": ALL})
    experts = peers.experts()
    experts.set_route(make_route(1, TINY, {"a": ALL}))
    pending = experts.begin(0, HIDDEN, TOPK_IDS, TOPK_WEIGHTS)
    thread = threading.Thread(target=experts.set_route, args=(make_route(2, TINY, {"b": ALL}),))
    thread.start()
    assert torch.equal(experts.finish(pending), EXPECTED)
    thread.join(30)
    assert torch.equal(call(experts), EXPECTED)
    assert experts.route_version == 2


def test_peers_that_cannot_be_reached_are_lost_and_tried_again() -> None:
    held = {"a": EVEN, "b": ODD}
    peers = Peers(held)
    peers.down = {"b"}
    seen: list[bool] = []
    experts = peers.experts(on_change=lambda: seen.append(experts.ready))
    experts.set_route(make_route(1, TINY, held))
    assert experts.lost_peers == ("b",)
    peers.down.clear()
    experts.set_route(make_route(2, TINY, held))
    assert experts.lost_peers == ()
    assert seen == [False, True]
    assert peers.opened.count("a") == 1


def test_a_peer_that_takes_no_link_is_lost_and_its_words_are_kept_until_it_takes_one() -> None:
    held = {"a": EVEN, "b": ODD}
    peers = Peers(held)
    peers.unlike = {"b"}
    experts = peers.experts()
    assert experts.refusal is None
    experts.set_route(make_route(1, TINY, held))
    assert (experts.ready, experts.lost_peers) == (False, ("b",))
    assert experts.refusal == "b computes another model"
    peers.unlike, peers.down = set(), {"b"}
    experts.set_route(make_route(2, TINY, held))
    assert (experts.lost_peers, experts.refusal) == (("b",), None)
    peers.down.clear()
    experts.set_route(make_route(3, TINY, held))
    assert (experts.ready, experts.refusal) == (True, None)


def test_a_peer_that_opens_too_late_is_let_go_and_holds_nobody_up() -> None:
    go_on, closed = threading.Event(), threading.Event()
    peers = Peers({"a": ALL})

    class LateLink(FaultyLink):
        def close(self) -> None:
            super().close()
            closed.set()

    def open_link(peer: Peer) -> PeerLink:
        if peer.worker_id == "a":
            return peers.open_link(peer)
        assert go_on.wait(30)
        return LateLink(peers.open_link(Peer(name="a", worker_id="a", address="")), lambda *_: False)

    experts = RoutedExperts(TINY, BLOCKS, 1.0, open_link)
    started = time.monotonic()
    experts.set_route(make_route(1, TINY, {"late": ALL, "a": ALL}))
    assert time.monotonic() - started < 20.0
    assert (experts.ready, experts.lost_peers) == (True, ("late",))
    assert torch.equal(call(experts), EXPECTED)
    go_on.set()
    assert closed.wait(30)


def test_a_route_of_another_model_is_refused_and_changes_nothing() -> None:
    held = {"a": ALL}
    experts = Peers(held).experts()
    experts.set_route(make_route(1, TINY, held))
    good = make_route(2, TINY, held)
    for owners in [good.owners[:2], (good.owners[0][:7], *good.owners[1:]), (((1,),) * 8, *good.owners[1:])]:
        with pytest.raises(ConfigError, match="route 2") as caught:
            experts.set_route(type(good)(version=2, peers=good.peers, owners=owners))
        assert caught.value.param == "owners"
    assert experts.route_version == 1
    assert torch.equal(call(experts), EXPECTED)
