"""Which workers are alike: who may go on with what another one began, and which model a pool of them has.

A request that has begun goes on at a worker that would have computed the same tokens. That takes the same model and, in
the class `invariant`, the same arithmetic on the same pages; the class `fast` promises a valid sample and not its bits,
on one worker as on two, so the same model and class are enough there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.protocol import Hello

logger = logging.getLogger(__name__)

MODEL = ("checkpoint", "dtype")
NUMERICS = ("numerics",)
BITS = ("arithmetic", "page_size")


def model_difference(ours: Hello, theirs: Hello) -> str | None:
    """How the model that `theirs` serves differs, in words; None: not at all."""
    return _difference(MODEL, ours, theirs)


def token_difference(began: Hello, other: Hello) -> str | None:
    """Why `other` might compute other tokens than the worker that began; None: it would not."""
    fields = MODEL + NUMERICS + (BITS if began.numerics == "invariant" else ())
    return _difference(fields, began, other)


def all_unlike(began: Hello, others: Mapping[str, Hello]) -> str | None:
    """Why none of `others`, by name, may go on, in words; None where one may, and where there are none."""
    differences = {name: token_difference(began, other) for name, other in others.items()}
    if not differences or None in differences.values():
        return None
    return "; ".join(f"{name} has {text}" for name, text in differences.items())


def _difference(fields: Iterable[str], ours: Hello, theirs: Hello) -> str | None:
    pairs = [(field, getattr(ours, field), getattr(theirs, field)) for field in fields]
    found = [f"{field.replace('_', ' ')} {b!r} instead of {a!r}" for field, a, b in pairs if a != b]
    return ", ".join(found) or None


@dataclass(frozen=True)
class PoolModel:
    """The model of a pool: what most of its workers serve.

    Nobody tells a gateway which of two checkpoints is meant. So a worker of another one gets nothing, until those like
    it are the majority, as in an update. While workers are missing, those of the model before may be among them: it
    keeps its place for `reign_s` without any.
    """

    reign_s: float
    hello: Hello | None = None  # of some worker that has it
    seen_s: float = 0.0  # when one was last there

    def difference(self, hello: Hello) -> str | None:
        """How a worker's model differs from the pool's, in words; None: not at all."""
        return None if self.hello is None else model_difference(self.hello, hello)

    def differences(self, hellos: Mapping[str, Hello]) -> dict[str, str]:
        """`difference` of those whose model differs, by name."""
        found = {name: self.difference(hello) for name, hello in hellos.items()}
        return {name: text for name, text in found.items() if text is not None}

    def counted(self, hellos: Iterable[Hello], num_missing: int, now: float) -> PoolModel:
        """What it is from `now` on, in seconds of any clock, by who is there and how many are not."""
        votes: Counter[tuple[str, ...] | None] = Counter()
        voters: dict[tuple[str, ...], Hello] = {}
        for hello in hellos:
            key = _key(hello)
            votes[key] += 1
            voters[key] = hello
        mine = None if self.hello is None else _key(self.hello)
        if mine is not None and not votes[mine] and num_missing and now - self.seen_s < self.reign_s:
            return self
        best = max(voters, key=lambda key: (votes[key], key == mine), default=None)
        if best is not None and best != mine:
            return replace(self, hello=voters[best], seen_s=now)
        return replace(self, seen_s=now) if votes[mine] else self


class ModelsTold:
    """What the log has of the models in a pool: each once."""

    def __init__(self) -> None:
        self._workers: set[str] = set()  # of another model than the pool's, by id

    def tell(self, before: PoolModel, now: PoolModel, hellos: Mapping[str, Hello]) -> None:
        differences = now.differences(hellos)
        self._workers -= {hello.worker_id for name, hello in hellos.items() if name not in differences}
        for name, text in differences.items():
            if (worker_id := hellos[name].worker_id) not in self._workers:
                self._workers.add(worker_id)
                logger.warning("worker %s has another model than this pool and gets no new requests: %s", name, text)
        if now.hello is not None and before.difference(now.hello) is not None:
            logger.warning("this pool has another model from now on: most of its workers do")


def _key(hello: Hello) -> tuple[str, ...]:
    return tuple(str(getattr(hello, field)) for field in MODEL)
