"""The page allocator under any order of calls."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.cache.pages import OutOfPagesError, PagePool


class PoolMachine(RuleBasedStateMachine):
    """Against a model that only knows who holds what and what was named."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.refs: dict[int, int] = {}
        self.names: dict[bytes, int] = {}

    @rule()
    def allocate(self) -> None:
        if len(self.refs) == 6:
            with pytest.raises(OutOfPagesError):
                self.pool.allocate()
            return
        page_id = self.pool.allocate()
        assert page_id not in self.refs, "a page in use was handed out"
        self.refs[page_id] = 1
        self.names = {name: page for name, page in self.names.items() if page != page_id}

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        page_id = data.draw(st.sampled_from(sorted(self.refs)))
        self.pool.free(page_id)
        self.refs[page_id] -= 1
        if self.refs[page_id] == 0:
            del self.refs[page_id]

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c"]))
    def publish(self, data: st.DataObject, name: bytes) -> None:
        page_id = data.draw(st.sampled_from(sorted(self.refs)))
        self.pool.publish(page_id, name)
        if name not in self.names and page_id not in self.names.values():
            self.names[name] = page_id

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        page_id = self.pool.find(name)
        assert page_id == self.names[name]
        self.pool.share(page_id)
        self.refs[page_id] = self.refs.get(page_id, 0) + 1

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()
        assert self.pool.num_used == len(self.refs)
        assert self.pool.num_used + self.pool.num_free == 6
        for page_id, refs in self.refs.items():
            assert self.pool.refs(page_id) == refs
        for name in (b"a", b"b", b"c"):
            assert self.pool.find(name) == self.names.get(name)


TestPool = PoolMachine.TestCase


def test_blank_pages_go_first_then_the_oldest_of_the_cache() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, b"first")
    pool.publish(second, b"second")
    pool.free(first)
    pool.free(second)
    pool.allocate()
    assert pool.find(b"first") == first
    assert pool.allocate() == first
    assert pool.find(b"first") is None
    assert pool.find(b"second") == second
