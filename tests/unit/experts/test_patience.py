"""How long peers are waited for, and what the watch over the engine's thread is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from cluster.errors import PeerLostError
from cluster.protocol import Launch, Peer
from tests.support.experts import make_host, make_route, serve_in_thread
from tests.support.hub_configs import HUB_CONFIGS
from tests.support.models import TINY, random_weights
from tests.support.numerics import numerics
from workers.experts import remote
from workers.experts.exchange import PeerLink
from workers.experts.frame import TensorSpec
from workers.experts.routed import RoutedExperts
from workers.experts.wire import Patience
from workers.models.families import spec_from_config

BLOCKS = numerics("blocks")
LAUNCH = Launch(address="", model_path="", served_name="")
HELD = {"a": (0, 2, 4, 6), "b": (1, 3, 5, 7)}
INPUTS = torch.Generator().manual_seed(5)
HIDDEN = torch.randn(9, TINY.hidden, generator=INPUTS)
TOPK_IDS = torch.tensor([[0, 1]] * 9)
TOPK_WEIGHTS = torch.rand(9, 2, generator=INPUTS)
assert TINY.moe is not None
LARGE = replace(TINY, moe=replace(TINY.moe, intermediate=10**9))  # only how long it takes is


@dataclass
class Waits:
    """What was said before each wait, and how long it may last."""

    said: list[float] = field(default_factory=list)
    found: list[tuple[str, float, float]] = field(default_factory=list)  # what is waited for, said, allowed
    now_s: float = 0.0
    hung: frozenset[str] = frozenset()

    def open_link(self, peer: Peer) -> PeerLink:
        host = make_host(TINY, random_weights(TINY), BLOCKS, HELD[peer.worker_id])
        return TimedLink(peer.worker_id, serve_in_thread(host), self)


@dataclass
class TimedLink:
    """A hung peer takes what it is sent, and no time but that of the test's clock passes until it is given up."""

    name: str
    link: PeerLink
    waits: Waits

    def send(self, tensors: Sequence[torch.Tensor], deadline_s: float) -> None:
        self.waits.found.append((f"send {self.name}", self.waits.said[-1], deadline_s))
        self.link.send(tensors, 30.0)

    def recv(self, specs: Sequence[TensorSpec], deadline_s: float) -> list[torch.Tensor]:
        self.waits.found.append((f"recv {self.name}", self.waits.said[-1], deadline_s))
        if self.name in self.waits.hung:
            self.waits.now_s += deadline_s
            raise PeerLostError("it took too long")
        return self.link.recv(specs, 30.0)

    def close(self) -> None:
        self.link.close()


def test_a_full_step_of_a_large_model_may_take_longer_than_the_watch_waits_by_itself() -> None:
    specs = [spec_from_config(config) for config in HUB_CONFIGS.values()]
    longest = max(
        Patience.for_model(spec, LAUNCH.peer_timeout_s).of(LAUNCH.token_budget * spec.moe.top_k)
        for spec in specs
        if spec.moe is not None
    )
    assert longest > LAUNCH.stuck_after_s


def test_the_watch_is_told_of_each_wait_before_it_begins() -> None:
    waits = Waits()
    experts = RoutedExperts(LARGE, BLOCKS, 2.0, waits.open_link, on_wait=waits.said.append)
    experts.set_route(make_route(1, TINY, HELD))
    experts.finish(experts.begin(0, HIDDEN, TOPK_IDS, TOPK_WEIGHTS))
    assert [what for what, _, _ in waits.found] == ["send a", "send b", "recv a", "recv b"]
    for _, said_s, allowed_s in waits.found:
        assert said_s == allowed_s > LAUNCH.stuck_after_s


def test_who_is_waited_for_second_has_had_its_time_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(hung=frozenset({"a", "b"}))
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: waits.now_s))
    experts = RoutedExperts(LARGE, BLOCKS, 2.0, waits.open_link, on_wait=waits.said.append)
    experts.set_route(make_route(1, TINY, HELD))
    pending = experts.begin(0, HIDDEN, TOPK_IDS, TOPK_WEIGHTS)
    with pytest.raises(PeerLostError):
        experts.finish(pending)
    whole_s = Patience.for_model(LARGE, 2.0).of(len(TOPK_IDS))
    assert [(what, allowed_s) for what, _, allowed_s in waits.found[2:]] == [("recv a", whole_s), ("recv b", 2.0)]
