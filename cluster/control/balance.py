"""Experts to workers: which copies lie where. Pure; `assign` takes a described problem and what is held already.

An expert's load is shared evenly by its copies. Layers run one after the other, and each waits for its most loaded
worker, so what is kept small is the *cost*: the sum over layers of the greatest load of a worker in that layer. (With
one layer that is the greatest load.) From nothing: copies go to the hottest experts, copies to workers by longest
processing time first (Graham 1969), then single moves, swaps and replicas while they help. Free slots are filled with
replicas even where the even split costs some balance: an expert with a replica survives the loss of a worker. The
idea of replicating the hottest experts and packing by load is that of EPLB (DeepSeek, 2025).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

SWAP_PARTNERS = 8  # the least loaded workers of a layer are tried for a move or swap
EPSILON = 1e-9  # relative: smaller gains are rounding


class Expert(NamedTuple):
    """One expert: `layer` counts the layers with routed experts (a row of `load`), not those of the model."""

    layer: int
    idx: int


@dataclass(frozen=True)
class ShardProblem:
    """Shapes: `load` [layers][experts]; `slots` (experts that fit) and `domains` [workers]."""

    load: Sequence[Sequence[float]]
    slots: Sequence[int]
    domains: Sequence[str]
    max_copies: int  # of one expert; no two in one failure domain
    slack: float  # the cost may exceed that of an assignment from nothing by this share before anything is moved

    @property
    def experts(self) -> Iterator[Expert]:
        return (Expert(layer, i) for layer, row in enumerate(self.load) for i in range(len(row)))

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.load))


def assign(problem: ShardProblem, held: Sequence[Collection[Expert]]) -> list[set[Expert]]:
    """The experts of each worker; the sum of `slots` must not be below the number of experts.

    `held`: what each worker has already. Where an expert has no copy, what is missing is placed and nothing
    else moves; a later call balances. That moves only where the cost is more than `slack` above that of an assignment
    from nothing, and takes, of several ways to get there, the one with the fewest moves.
    """
    assert sum(problem.slots) >= problem.num_experts
    if not any(held):
        return _from_nothing(problem).by_worker()
    kept = _Shards(problem, held)
    missing = {expert for expert, holders in kept.holders.items() if not holders}
    if missing:
        kept.restore_missing()
        kept.add_replicas(sorted(missing))
        return kept.by_worker()
    kept.add_replicas()
    fresh = _from_nothing(problem)
    allowed = fresh.cost() * (1 + problem.slack + EPSILON)
    if kept.cost() <= allowed:
        return kept.by_worker()
    improved = _Shards(problem, held)
    improved.improve(allowed)
    improved.add_replicas()
    recounted = _Shards(problem, held)
    recounted.drop_replicas_beyond({expert: len(holders) for expert, holders in fresh.holders.items()})
    recounted.add_replicas()
    recounted.improve(allowed)
    recounted.add_replicas()
    good = [shards.by_worker() for shards in (improved, recounted, fresh) if shards.cost() <= allowed]
    return min(good, key=lambda new: num_moves(held, new))


def num_moves(held: Sequence[Collection[Expert]], new: Sequence[Collection[Expert]]) -> int:
    """Experts that workers must load: what each gets and has not."""
    return sum(len(set(after) - set(before)) for before, after in zip(held, new, strict=True))


def cost(problem: ShardProblem, held: Sequence[Collection[Expert]]) -> float:
    """The sum over layers of the greatest load of a worker in it; the same unit as `load`."""
    return _Shards(problem, held, checked=False).cost()


def _from_nothing(problem: ShardProblem) -> _Shards:
    shards = _Shards(problem, [()] * len(problem.slots))
    copies = _num_copies(problem)
    share = {expert: problem.load[expert.layer][expert.idx] / num for expert, num in copies.items()}
    for expert in sorted(copies, key=lambda expert: (-share[expert], expert)):
        for _ in range(copies[expert]):
            worker = shards.best_worker(expert, share[expert])
            if worker is None:
                break  # no room in a domain without it; the first copy always finds a place
            shards.add(expert, worker)
    while True:
        shards.improve()
        if not shards.add_replicas():
            return shards


def _num_copies(problem: ShardProblem) -> dict[Expert, int]:
    """One copy of each, then one more of what is hottest per copy while slots are left."""
    copies = dict.fromkeys(problem.experts, 1)
    spare = sum(problem.slots) - len(copies)
    most = min(problem.max_copies, len(set(problem.domains)))
    hottest = [(-problem.load[expert.layer][expert.idx], expert) for expert in copies]
    heapq.heapify(hottest)
    while spare > 0 and most > 1 and hottest:
        _, expert = heapq.heappop(hottest)
        copies[expert] += 1
        spare -= 1
        if copies[expert] < most:
            heapq.heappush(hottest, (-problem.load[expert.layer][expert.idx] / copies[expert], expert))
    return copies


class _Exchange(NamedTuple):
    """`expert` goes from a layer's most loaded worker to `light`, and `other`, if any, comes back."""

    light: int
    expert: Expert
    other: Expert | None


class _Shards:
    """The state that the steps above change; every change keeps slots, domains and `max_copies`."""

    def __init__(self, problem: ShardProblem, held: Sequence[Collection[Expert]], *, checked: bool = True) -> None:
        num_workers = len(problem.slots)
        self.problem = problem
        self.max_copies = min(problem.max_copies, len(set(problem.domains)))
        self.holders: dict[Expert, set[int]] = {expert: set() for expert in problem.experts}
        self.held: list[list[set[Expert]]] = [[set() for _ in range(num_workers)] for _ in problem.load]
        self.layer_load = [[0.0] * num_workers for _ in problem.load]
        self.num_held = [0] * num_workers
        for worker, experts in enumerate(held):
            for expert in sorted(experts):
                if not checked or (expert in self.holders and self.may_hold(expert, worker)):
                    self.add(expert, worker)
        if checked:
            self._trim()

    def by_worker(self) -> list[set[Expert]]:
        return [set().union(*(layer[worker] for layer in self.held)) for worker in range(len(self.num_held))]

    def load_of(self, expert: Expert) -> float:
        return self.problem.load[expert.layer][expert.idx]

    def share_of(self, expert: Expert) -> float:
        return self.load_of(expert) / max(1, len(self.holders[expert]))

    def cost(self) -> float:
        return sum(max(loads) for loads in self.layer_load)

    def num_free(self, worker: int) -> int:
        return self.problem.slots[worker] - self.num_held[worker]

    def may_hold(self, expert: Expert, worker: int, leaving: int | None = None) -> bool:
        """Whether a copy may lie there beside the others, but for the one that leaves `leaving`; slots aside."""
        others = self.holders[expert] - {leaving}
        domains = self.problem.domains
        return len(others) < self.max_copies and all(domains[other] != domains[worker] for other in others)

    def add(self, expert: Expert, worker: int) -> None:
        self._set_holders(expert, self.holders[expert] | {worker})
        self.held[expert.layer][worker].add(expert)
        self.num_held[worker] += 1

    def remove(self, expert: Expert, worker: int) -> None:
        self._set_holders(expert, self.holders[expert] - {worker})
        self.held[expert.layer][worker].remove(expert)
        self.num_held[worker] -= 1

    def _set_holders(self, expert: Expert, holders: set[int]) -> None:
        loads = self.layer_load[expert.layer]
        for worker in self.holders[expert]:
            loads[worker] -= self.share_of(expert)
        self.holders[expert] = holders
        for worker in holders:
            loads[worker] += self.share_of(expert)

    def best_worker(self, expert: Expert, share: float) -> int | None:
        """The worker with a free slot, in a domain without the expert, that is the least loaded with it."""
        fit = [w for w in range(len(self.num_held)) if self.num_free(w) > 0 and self.may_hold(expert, w)]
        loads, held = self.layer_load[expert.layer], self.held[expert.layer]
        return min(fit, key=lambda w: (loads[w] + share, len(held[w]), -self.num_free(w), w), default=None)

    def _trim(self) -> None:
        """Let workers that hold more than fits let go: replicas first, then the coldest."""
        for worker in range(len(self.num_held)):
            if self.num_free(worker) >= 0:
                continue
            experts = sorted(
                (len(self.holders[expert]) == 1, self.load_of(expert), expert)
                for layer in self.held
                for expert in layer[worker]
            )
            for _, _, expert in experts[: -self.num_free(worker)]:
                self.remove(expert, worker)

    def restore_missing(self) -> None:
        """One copy of each expert that has none, the hottest first; where no slot is free a cold replica gives way."""
        missing = sorted(
            (expert for expert, holders in self.holders.items() if not holders), key=lambda e: (-self.load_of(e), e)
        )
        replicas = sorted(self.holders, key=lambda e: (-self.share_of(e), e))  # the coldest last
        for expert in missing:
            if all(self.num_free(worker) <= 0 for worker in range(len(self.num_held))):
                while len(self.holders[replicas[-1]]) < 2:
                    replicas.pop()
                self.remove(replicas[-1], self._heaviest_holder(replicas[-1]))
            worker = self.best_worker(expert, self.load_of(expert))
            assert worker is not None
            self.add(expert, worker)

    def _heaviest_holder(self, expert: Expert) -> int:
        return max(self.holders[expert], key=lambda w: (self.layer_load[expert.layer][w], w))

    def add_replicas(self, experts: Collection[Expert] | None = None) -> int:
        """Copies of `experts` (None: of all) into free slots, the hottest per copy first; how many were added."""
        num_added = 0
        queue = [(-self.share_of(expert), expert) for expert in (self.holders if experts is None else experts)]
        heapq.heapify(queue)
        while queue and any(self.num_free(worker) > 0 for worker in range(len(self.num_held))):
            _, expert = heapq.heappop(queue)
            worker = self.best_worker(expert, self.load_of(expert) / (len(self.holders[expert]) + 1))
            if worker is not None:
                self.add(expert, worker)
                num_added += 1
                heapq.heappush(queue, (-self.share_of(expert), expert))
        return num_added

    def drop_replicas_beyond(self, num_copies: dict[Expert, int]) -> None:
        for expert, num in num_copies.items():
            while len(self.holders[expert]) > num:
                self.remove(expert, self._heaviest_holder(expert))

    def improve(self, allowed_cost: float = 0.0) -> None:
        """Single changes that lower a layer's greatest load, until none is left or the cost is allowed."""
        cost = self.cost()
        excess = [max(loads) - sum(loads) / len(loads) for loads in self.layer_load]
        for layer in sorted(range(len(excess)), key=lambda layer: (-excess[layer], layer)):
            loads = self.layer_load[layer]
            for _ in range(4 * len(self.problem.load[layer])):
                if cost <= allowed_cost:
                    return
                heavy = max(range(len(loads)), key=lambda w: (loads[w], -w))
                exchange = self._best_exchange(layer, heavy)
                if exchange is not None:
                    self._make(exchange, heavy)
                elif not self._replicate(layer, heavy):
                    break
                cost = self.cost()

    def _replicate(self, layer: int, heavy: int) -> bool:
        """Give one of the most loaded worker's hottest experts another copy, in the place of a colder replica."""
        before = self.cost()
        loads = self.layer_load[layer]
        lightest = sorted((w for w in range(len(loads)) if w != heavy), key=lambda w: (loads[w], w))[:SWAP_PARTNERS]
        hottest = sorted(self.held[layer][heavy], key=lambda e: (-self.share_of(e), e))[:SWAP_PARTNERS]
        for expert in hottest:
            for light in lightest:
                if not self.may_hold(expert, light):
                    continue
                for other in self._cold_replicas(light, layer):
                    self.remove(other, light)
                    self.add(expert, light)
                    if self.cost() < before * (1 - EPSILON):
                        return True
                    self.remove(expert, light)
                    self.add(other, light)
        return False

    def _cold_replicas(self, worker: int, layer: int) -> list[Expert]:
        """The coldest experts there with another copy elsewhere: of this layer, and of all layers."""

        def coldest(experts: Iterable[Expert]) -> list[Expert]:
            replicas = [expert for expert in experts if len(self.holders[expert]) > 1]
            return heapq.nsmallest(1, replicas, key=lambda e: (self.share_of(e), e))

        return coldest(self.held[layer][worker]) + coldest(chain.from_iterable(held[worker] for held in self.held))

    def _best_exchange(self, layer: int, heavy: int) -> _Exchange | None:
        loads = self.layer_load[layer]
        best: _Exchange | None = None
        least = loads[heavy] * (1 - EPSILON)
        shares = [[(self.share_of(expert), expert) for expert in sorted(experts)] for experts in self.held[layer]]
        lightest = sorted((w for w in range(len(loads)) if w != heavy), key=lambda w: (loads[w], w))[:SWAP_PARTNERS]
        for light in lightest:
            back: list[tuple[float, Expert | None]] = [(0.0, None)] if self.num_free(light) > 0 else []
            back += shares[light]
            for share, expert in shares[heavy]:
                if not self.may_hold(expert, light, leaving=heavy):
                    continue
                for other_share, other in back:
                    gain = share - other_share
                    greatest = max(loads[heavy] - gain, loads[light] + gain)
                    if greatest < least and (other is None or self.may_hold(other, heavy, leaving=light)):
                        least, best = greatest, _Exchange(light, expert, other)
        return best

    def _make(self, exchange: _Exchange, heavy: int) -> None:
        light, expert, other = exchange
        self.remove(expert, heavy)
        if other is not None:
            self.remove(other, light)
            self.add(other, heavy)
        self.add(expert, light)
