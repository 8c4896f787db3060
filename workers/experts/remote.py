"""Experts on other workers: rows go out by owner, outputs come back unweighted, and are added where the tokens are.

A *choice* is one of a token's top k experts; choice c of token t has the number t * k + c. An expert worker returns the
output of each choice by itself. The attention worker adds them in top-k order, as it does with its own: who computed
one changes no bit of the sum (numerics class `invariant`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from cluster.errors import PeerLostError
from cluster.protocol import Peer
from workers.experts.backend import Pending
from workers.experts.exchange import PeerLink
from workers.experts.shard import Shard, expert_rows
from workers.experts.wire import OK, Call, Patience, recv_reply, send_call, send_stop
from workers.kernels.moe_combine import moe_combine
from workers.numerics import Numerics

log = logging.getLogger(__name__)

NOBODY, HERE = -2, -1  # in the place of a remote
STOP_S = 0.5  # to tell a peer that no more calls come


@dataclass(slots=True, eq=False)
class Remote:
    """A peer and the link to it; None once it broke, or where it could not be opened."""

    peer: Peer
    link: PeerLink | None
    refusal: str | None = None  # why it takes no link, in its words


@dataclass(frozen=True)
class Holders:
    """Who holds which experts, at one moment."""

    remotes: Sequence[Remote]
    places: Sequence[Sequence[Sequence[int]]]  # by layer, by expert: places in `remotes`, the preferred first


@dataclass(frozen=True, slots=True)
class Asked:
    """A call whose reply is due."""

    remote: Remote
    call: Call
    choices: torch.Tensor  # [n] int64, that it computes: the rows of `call`
    end: float  # `time.monotonic()`


@dataclass(frozen=True, slots=True)
class RemotePending(Pending):
    """What is on its way, for T tokens."""

    layer: int
    hidden: torch.Tensor  # [T, H]
    flat_ids: torch.Tensor  # [T * k]
    topk_weights: torch.Tensor  # [T, k]
    outputs: torch.Tensor  # [T * k, H], by choice; filled as they come
    asked: list[Asked] = field(default_factory=list)
    failed: list[torch.Tensor] = field(default_factory=list)  # choices whose remote was lost


class MixedExperts:
    """Some experts here, the others behind links. `begin` sends and computes its own; `finish` waits for the rest.

    A remote that dies, is late or lacks an expert is passed over from then on, and its choices go to the next holder.
    The calls come from one thread; `hold` may come from another.
    """

    def __init__(
        self,
        shard: Shard,
        num_experts: Sequence[int],
        numerics: Numerics,
        patience: Patience,
        on_change: Callable[[], None] = lambda: None,
        on_wait: Callable[[float], object] = lambda _: None,
    ) -> None:
        """`num_experts` by layer, 0 where it is dense. `on_change` follows a loss, and `on_wait` precedes each wait for
        a peer and gets the most seconds that it lasts; both on the thread of the calls.
        """
        self._shard = shard
        self._num_experts = num_experts
        self._own_places = [shard.places(layer, count) for layer, count in enumerate(num_experts)]
        self._numerics = numerics
        self._patience = patience
        self._on_change = on_change
        self._on_wait = on_wait
        self._state = threading.Condition()  # guards what follows
        self._holders = Holders((), [[()] * count for count in num_experts])
        self._lacks: set[tuple[int, int, int]] = set()  # a remote's place, layer, expert: it said so itself
        self._owners: list[torch.Tensor] = []  # by layer, [E] int64: a remote's place, HERE or NOBODY
        self._is_ready = False
        self._under_way: RemotePending | None = None
        self._choose_owners()

    @property
    def is_ready(self) -> bool:
        """Every expert is here or behind a link that is up."""
        return self._is_ready

    @property
    def holders(self) -> Holders:
        return self._holders

    def hold(self, holders: Holders) -> None:
        """From the next call on, experts are with these; remotes that are not among them are closed.

        Blocks while a call is under way, whose replies are still due on the old links.
        """
        with self._state:
            gone = [remote for remote in self._holders.remotes if remote not in holders.remotes]
            self._holders = holders
            self._lacks.clear()
            self._choose_owners()
            pending = self._under_way
            if pending is not None:
                patience_s = self._patience.of(pending.flat_ids.shape[0])
                self._state.wait_for(lambda: self._under_way is not pending, patience_s)
        for remote in gone:
            _close(remote)

    def close(self) -> None:
        """Tell every peer that no more calls come."""
        self.hold(Holders((), [[()] * count for count in self._num_experts]))

    def begin(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> RemotePending:
        """hidden [T, H], topk_ids [T, k] int64, topk_weights [T, k] float32. Raises `PeerLostError`."""
        flat_ids = topk_ids.reshape(-1)
        outputs = hidden.new_empty(flat_ids.shape[0], hidden.shape[1])
        pending = RemotePending(layer, hidden, flat_ids, topk_weights, outputs)
        self._start(pending)
        try:
            own = self._ask(pending)
        except PeerLostError:
            self._end()
            raise
        if own.numel():
            weights = self._shard.weights[layer]
            assert weights is not None, f"layer {layer} has no experts here"
            places = self._own_places[layer].to(flat_ids.device)[flat_ids[own]]
            outputs[own] = expert_rows(weights, hidden[own // topk_ids.shape[1]], places, self._numerics)
        return pending

    def finish(self, pending: Pending) -> torch.Tensor:
        """-> [T, H]. Raises `PeerLostError` where nobody is left for a choice; the links that are up stay in step."""
        assert isinstance(pending, RemotePending)
        try:
            self._collect(pending)
            while pending.failed:
                failed = torch.cat(pending.failed)
                pending.failed.clear()
                self._ask(pending, failed)
                self._collect(pending)
        except PeerLostError:  # nothing is under way: whatever else leaves here may leave replies that are due
            self._end()
            raise
        self._end()
        num_tokens, top_k = pending.topk_weights.shape
        return moe_combine(pending.outputs.view(num_tokens, top_k, -1), pending.topk_weights, self._numerics)

    # ------------------------------------------------------------------------------------------------ parts of a call

    def _start(self, pending: RemotePending) -> None:
        with self._state:
            left, self._under_way = self._under_way, pending
        if left is not None:  # a step that failed between begin and finish: replies are due that nobody took
            for asked in left.asked:
                self._lose(asked.remote, PeerLostError("a call was broken off"))

    def _end(self) -> None:
        with self._state:
            self._under_way = None
            self._state.notify_all()

    def _ask(self, pending: RemotePending, choices: torch.Tensor | None = None) -> torch.Tensor:
        """Send each of `choices` (all, if None) to its owner, one call a remote; -> those that are to be computed here.

        Nothing may be under way: a remote takes no second call before its reply is taken. Raises `PeerLostError`, and
        then has sent nothing.
        """
        with self._state:
            remotes, owners = self._holders.remotes, self._owners[pending.layer]
        expert_ids = pending.flat_ids if choices is None else pending.flat_ids[choices]
        owner = owners.to(expert_ids.device)[expert_ids]
        order = owner.argsort(stable=True)  # so that what each owner gets lies together
        counts = torch.bincount(owner - NOBODY, minlength=len(remotes) - NOBODY).tolist()
        expert_ids, choices = expert_ids[order].cpu(), order if choices is None else choices[order]
        if num_missing := counts[0]:
            missing = expert_ids[:num_missing].unique().tolist()
            raise PeerLostError(f"no worker that can be reached holds experts {missing} of layer {pending.layer}")
        num_here = start = counts[1]
        top_k = pending.topk_weights.shape[1]
        hidden = pending.hidden.index_select(0, choices // top_k).cpu()
        for remote, count in zip(remotes, counts[2:], strict=True):
            if not count:
                continue
            part = slice(start, start + count)
            start += count
            call = Call(pending.layer, expert_ids[part], hidden[part])
            patience_s = self._patience.of(count)
            self._on_wait(patience_s)
            try:
                send_call(_open(remote), call, patience_s)
            except PeerLostError as error:
                self._lose(remote, error)
                pending.failed.append(choices[part])
            else:
                pending.asked.append(Asked(remote, call, choices[part], time.monotonic() + patience_s))
        return choices[:num_here]

    def _collect(self, pending: RemotePending) -> None:
        """Take all replies that are due; choices without one are `pending.failed`.

        In the order of the calls, since gloo cannot wait for whichever comes first. It costs no time: all peers work
        meanwhile, and each one's time runs from its call.
        """
        for asked in pending.asked:
            # What has come while another was waited for is still to be taken.
            left_s = max(self._patience.peer_s, asked.end - time.monotonic())
            self._on_wait(left_s)
            try:
                output, missing = recv_reply(_open(asked.remote), asked.call, left_s)
            except PeerLostError as error:
                self._lose(asked.remote, error)
                pending.failed.append(asked.choices)
                continue
            if missing == OK:
                pending.outputs.index_copy_(0, asked.choices, output.to(pending.outputs.device))
            else:
                self._pass_over(asked.remote, pending.layer, missing)
                pending.failed.append(asked.choices)
        pending.asked.clear()

    def _lose(self, remote: Remote, error: PeerLostError) -> None:
        with self._state:
            if remote.link is None:
                return
            remote.link.close()
            remote.link = None
            self._choose_owners()
        log.warning("expert worker %s (%s) is lost: %s", remote.peer.name, remote.peer.address, error.message)
        self._on_change()

    def _pass_over(self, remote: Remote, layer: int, expert: int) -> None:
        with self._state:
            if remote in self._holders.remotes:
                self._lacks.add((self._holders.remotes.index(remote), layer, expert))
                self._choose_owners()
        log.warning("expert worker %s does not hold expert %d of layer %d", remote.peer.name, expert, layer)
        self._on_change()

    def _choose_owners(self) -> None:
        """Whom each expert is asked of; under the lock."""
        up = [remote.link is not None for remote in self._holders.remotes]
        self._owners = []
        for layer, experts in enumerate(self._holders.places):
            owners = [
                next((p for p in places if up[p] and (p, layer, expert) not in self._lacks), NOBODY)
                for expert, places in enumerate(experts)
            ]
            for expert in self._shard.expert_ids[layer]:
                owners[expert] = HERE
            self._owners.append(torch.tensor(owners, dtype=torch.int64))
        self._is_ready = not any(bool((owners == NOBODY).any()) for owners in self._owners)


def _open(remote: Remote) -> PeerLink:
    if remote.link is None:
        raise PeerLostError(f"the link to {remote.peer.name} is broken")
    return remote.link


def _close(remote: Remote) -> None:
    if remote.link is not None:
        try:
            send_stop(remote.link, STOP_S)
        except PeerLostError as error:
            log.debug("expert worker %s is gone already: %s", remote.peer.name, error.message)
        remote.link.close()
