"""The page allocator: reference-counted pages, those of the prefix cache reused last."""

from __future__ import annotations

from collections import OrderedDict

from cluster.errors import EngineError


class OutOfPagesError(EngineError):
    """No page is free; the scheduler preempts."""


class PagePool:
    """Hands out page ids 0..num_pages-1.

    A page is *used* (reference count > 0) or *free*. A free page may keep its content for the prefix cache under its
    hash; such pages are handed out only when no blank one is left, the least recently used first. used + free ==
    total at all times.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._refs = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, bytes] = OrderedDict()  # free pages with content, oldest first
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now, with or without content."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return sum(1 for refs in self._refs if refs)

    def refs(self, page_id: int) -> int:
        return self._refs[page_id]

    def allocate(self) -> int:
        """A page with reference count one, content undefined. Raises `OutOfPagesError`."""
        if self._blank:
            page_id = self._blank.pop()
        elif self._cached:
            page_id, digest = self._cached.popitem(last=False)
            del self._hash_of[page_id], self._page_of[digest]
        else:
            raise OutOfPagesError(f"all {self.num_pages} KV pages are in use")
        self._refs[page_id] = 1
        return page_id

    def share(self, page_id: int) -> None:
        """One more reference to a page in use, or a free one taken back with its content."""
        if self._refs[page_id] == 0:
            del self._cached[page_id]
        self._refs[page_id] += 1

    def free(self, page_id: int) -> None:
        """Give back one reference."""
        assert self._refs[page_id] > 0, f"page {page_id} freed twice"
        self._refs[page_id] -= 1
        if self._refs[page_id] == 0:
            if (digest := self._hash_of.get(page_id)) is not None:
                self._cached[page_id] = digest
            else:
                self._blank.append(page_id)

    def publish(self, page_id: int, digest: bytes) -> None:
        """Name a full page's content; the first page of a content keeps the name."""
        if digest not in self._page_of and page_id not in self._hash_of:
            self._page_of[digest] = page_id
            self._hash_of[page_id] = digest

    def is_published(self, page_id: int) -> bool:
        return page_id in self._hash_of

    def find(self, digest: bytes) -> int | None:
        """The page that holds this content, used or free; None where there is none."""
        return self._page_of.get(digest)

    def check(self) -> None:
        """Raise AssertionError unless every page is exactly one of used, blank and cached."""
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a page is free twice"
        assert all(self._refs[page_id] == 0 for page_id in free), "a used page is free"
        assert self.num_used + len(free) == self.num_pages, "a page is lost"
