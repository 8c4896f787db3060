"""Requests' pages: sharing, copying before a write, and giving back."""

import pytest

from tests.support.models import make_request
from workers.cache.page_table import PageTable
from workers.cache.pages import OutOfPagesError, PagePool
from workers.request import Request

PAGE = 4


class Memory:
    """Page contents as the table's callbacks see them."""

    def __init__(self) -> None:
        self.copied: list[tuple[int, int]] = []
        self.cleared: list[int] = []

    def table(self, num_pages: int, prefix_cache: bool = True) -> PageTable:
        return PageTable(
            PagePool(num_pages),
            PAGE,
            lambda source, target: self.copied.append((source, target)),
            self.cleared.append,
            ("model",),
            prefix_cache,
        )


def compute(table: PageTable, request: Request, num_tokens: int) -> None:
    table.reserve(request, num_tokens)
    request.num_computed += num_tokens
    table.publish(request)


def test_a_prefix_is_found_up_to_the_token_before_the_last() -> None:
    table = Memory().table(8)
    first = make_request("a", range(8))
    compute(table, first, 8)
    again = make_request("b", range(8))
    assert table.match_prefix(again) == 4  # the second page holds the last token, whose logits are needed
    assert again.page_ids == first.page_ids[:1]
    longer = make_request("c", range(9))
    assert table.match_prefix(longer) == 8


@pytest.mark.parametrize("change", [{"cache_salt": "tenant"}, {"position_offset": 4}])
def test_what_changes_a_page_separates_prefixes(change: dict[str, object]) -> None:
    table = Memory().table(8)
    compute(table, make_request("a", range(9)), 9)
    assert table.match_prefix(make_request("b", range(9), **change)) == 0


def test_reserve_clears_new_pages_and_copies_shared_ones() -> None:
    memory = Memory()
    table = memory.table(8)
    source = make_request("a", range(6))
    compute(table, source, 6)
    assert memory.cleared == source.page_ids
    fork = make_request("b", range(6))
    table.share(source, fork, 5)
    shared = fork.page_ids[1]
    table.reserve(fork, 1)
    assert fork.page_ids[0] == source.page_ids[0]
    assert fork.page_ids[1] != shared
    assert memory.copied == [(shared, fork.page_ids[1])]
    assert source.page_ids[1] == shared


def test_a_published_page_is_copied_before_a_rewound_request_writes_it() -> None:
    memory = Memory()
    table = memory.table(8)
    request = make_request("a", range(8))
    compute(table, request, 8)
    named = request.page_ids[1]
    table.truncate(request, 6)
    table.reserve(request, 1)
    assert memory.copied == [(named, request.page_ids[1])]
    other = make_request("b", range(9))
    assert table.match_prefix(other) == 8
    assert other.page_ids[1] == named


def test_a_reservation_that_fails_changes_nothing() -> None:
    table = Memory().table(2)
    request = make_request("a", range(12))
    with pytest.raises(OutOfPagesError, match="3 KV pages are needed and 2 are free"):
        table.reserve(request, 12)
    assert request.page_ids == []
    assert table.pool.num_free == 2


def test_release_gives_everything_back() -> None:
    table = Memory().table(8)
    first, second = make_request("a", range(8)), make_request("b", range(9))
    compute(table, first, 8)
    table.match_prefix(second)
    compute(table, second, second.num_uncomputed)
    table.release(first)
    table.release(second)
    table.pool.check()
    assert table.pool.num_used == 0


def test_without_the_prefix_cache_nothing_is_found() -> None:
    table = Memory().table(8, prefix_cache=False)
    compute(table, make_request("a", range(9)), 9)
    assert table.match_prefix(make_request("b", range(9))) == 0
