"""The responses that `previous_response_id` goes on from: in this process's memory, each tenant's for itself.

A response holds the one that it went on from, so a conversation's messages are there once however many responses it
has. The store is bounded in number, bytes and time; whoever holds the most loses the oldest first.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.gateway.openai import ChatMessage

MAX_RESPONSES = 8192
MAX_BYTES = 128 * 2**20
MAX_AGE_S = 24 * 3600.0
OBJECT_BYTES = 1024  # of a message, a call or a response beside its texts


@dataclass(slots=True, eq=False)
class StoredResponse:
    """One turn of a conversation. Its texts are JSON: what `GET` answers with."""

    response_id: str
    body: bytes
    input_items: tuple[bytes, ...]  # of this turn, the first one first
    messages: tuple[ChatMessage, ...]  # of this turn: its input, then the reply
    previous: StoredResponse | None = None
    num_holders: int = 0  # the store's list, and the turns that went on from it
    kept_at: float = 0.0
    num_bytes: int = field(init=False)  # without those of the turns before

    def __post_init__(self) -> None:
        texts = OBJECT_BYTES + sys.getsizeof(self.body) + sum(map(sys.getsizeof, self.input_items))
        self.num_bytes = texts + sum(map(_num_bytes, self.messages))

    @property
    def conversation(self) -> tuple[ChatMessage, ...]:
        """The messages of all turns up to this one."""
        turns = []
        turn: StoredResponse | None = self
        while turn is not None:
            turns.append(turn.messages)
            turn = turn.previous
        return tuple(message for messages in reversed(turns) for message in messages)


def _num_bytes(message: ChatMessage) -> int:
    texts = [message.content, message.reasoning, message.tool_call_id, message.name]
    for call in message.tool_calls:
        texts += [call.id, call.function.name, call.function.arguments]
    return OBJECT_BYTES * (1 + len(message.tool_calls)) + sum(sys.getsizeof(text) for text in texts if text)


@dataclass(slots=True)
class _Shelf:
    """What one tenant has, the oldest first."""

    response_ids: OrderedDict[str, None] = field(default_factory=OrderedDict)
    num_bytes: int = 0


class ResponseStore:
    """All tenants' responses. For the event loop's thread, but for `find`."""

    def __init__(
        self,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_age_s = max_age_s
        self.num_bytes = 0
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._clock = clock
        self._responses: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()  # by tenant and id, oldest first
        self._shelves: dict[str, _Shelf] = {}

    @property
    def num_responses(self) -> int:
        return len(self._responses)

    def of(self, tenant: str) -> TenantResponses:
        return TenantResponses(self, tenant)

    def find(self, tenant: str, response_id: str) -> StoredResponse | None:
        found = self._responses.get((tenant, response_id))
        return None if found is None or self._is_old(found) else found

    def keep(self, tenant: str, response: StoredResponse) -> None:
        """The oldest go where there is no room for it; it goes itself where it is too large with what it stands on."""
        response.kept_at = self._clock()
        self._responses[tenant, response.response_id] = response
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.response_ids[response.response_id] = None
        turn: StoredResponse | None = response
        while turn is not None:
            turn.num_holders += 1
            if turn.num_holders > 1:
                break
            self._count(shelf, turn.num_bytes)
            turn = turn.previous
        self._make_room()

    def forget(self, tenant: str, response_id: str) -> None:
        """The turns that went on from it go on holding what they stand on."""
        turn: StoredResponse | None = self._responses.pop((tenant, response_id))
        shelf = self._shelves[tenant]
        del shelf.response_ids[response_id]
        while turn is not None:
            turn.num_holders -= 1
            if turn.num_holders:
                break
            self._count(shelf, -turn.num_bytes)
            turn = turn.previous
        if not shelf.response_ids:
            del self._shelves[tenant]

    def _count(self, shelf: _Shelf, num_bytes: int) -> None:
        shelf.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def _is_old(self, response: StoredResponse) -> bool:
        return self._clock() > response.kept_at + self.max_age_s

    def _make_room(self) -> None:
        while self._responses and self._is_old(next(iter(self._responses.values()))):
            self.forget(*next(iter(self._responses)))
        while self.num_responses > self._max_responses:
            self._drop_one_of(max(self._shelves, key=lambda tenant: len(self._shelves[tenant].response_ids)))
        while self.num_bytes > self._max_bytes:
            self._drop_one_of(max(self._shelves, key=lambda tenant: self._shelves[tenant].num_bytes))

    def _drop_one_of(self, tenant: str) -> None:
        self.forget(tenant, next(iter(self._shelves[tenant].response_ids)))


@dataclass(frozen=True, slots=True)
class TenantResponses:
    """What one tenant sees of the store. `tenant` "": whoever has no key, where none is needed."""

    store: ResponseStore
    tenant: str

    def find(self, response_id: str) -> StoredResponse | None:
        return self.store.find(self.tenant, response_id)

    def keep(self, response: StoredResponse) -> bool:
        """Whether there was room for it."""
        self.store.keep(self.tenant, response)
        return self.find(response.response_id) is response

    def forget(self, response_id: str) -> bool:
        """Whether it was there."""
        if self.find(response_id) is None:
            return False
        self.store.forget(self.tenant, response_id)
        return True
