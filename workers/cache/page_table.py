"""Requests' pages: what a request holds, what it shares, and what is copied before it is written."""

from __future__ import annotations

from collections.abc import Callable

from workers.cache.pages import OutOfPagesError, PagePool
from workers.cache.prefix import chain_root, extend_chain
from workers.request import Request


class PageTable:
    """Gives requests pages out of a `PagePool`. A page that somebody else can see is copied before a write."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        copy_page: Callable[[int, int], None],
        clear_page: Callable[[int], None] | None = None,
        root_facts: tuple[object, ...] = (),
        prefix_cache: bool = True,
    ) -> None:
        """`root_facts` is everything beside tokens, salt and offset that the content of a page depends on.

        `clear_page` blanks a page before a new owner, for kernels that read what they then mask.
        """
        self.pool = pool
        self.page_size = page_size
        self._copy_page = copy_page
        self._clear_page = clear_page
        self._root_facts = root_facts
        self._prefix_cache = prefix_cache

    def uses_prefixes(self, request: Request) -> bool:
        """Whether the prefix cache may serve this request: nothing of its prompt but the end must be asked for."""
        return self._prefix_cache and request.sampling.prompt_logprobs is None and request.pooling != "mean"

    def match_prefix(self, request: Request) -> int:
        """Give a request without pages those that the prefix cache has; -> tokens found.

        The last token is never taken from the cache: its logits are needed.
        """
        assert not request.page_ids
        if not self.uses_prefixes(request):
            return 0
        self._extend_hashes(request, len(request.tokens))
        for digest in request.page_hashes[: (len(request.tokens) - 1) // self.page_size]:
            page_id = self.pool.find(digest)
            if page_id is None:
                break
            self.pool.share(page_id)
            request.page_ids.append(page_id)
        request.num_computed = len(request.page_ids) * self.page_size
        return request.num_computed

    def reserve(self, request: Request, num_tokens: int) -> None:
        """Make room for the next `num_tokens` tokens, in pages that only this request writes.

        Raises `OutOfPagesError`, and then nothing has changed.
        """
        first = request.num_computed // self.page_size
        last = (request.num_computed + num_tokens - 1) // self.page_size
        if first == last < len(request.page_ids) and not self._is_shared(request.page_ids[first]):
            return  # the common case of decoding
        shared, num_new = self._needs(request, num_tokens)
        if num_new + len(shared) > self.pool.num_free:
            raise OutOfPagesError(f"{num_new + len(shared)} KV pages are needed and {self.pool.num_free} are free")
        for i in shared:
            copy = self.pool.allocate()
            self._copy_page(request.page_ids[i], copy)
            self.pool.free(request.page_ids[i])
            request.page_ids[i] = copy
        for _ in range(num_new):
            request.page_ids.append(self.pool.allocate())
            if self._clear_page is not None:
                self._clear_page(request.page_ids[-1])

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """Pages that `reserve` would have to allocate."""
        shared, num_new = self._needs(request, num_tokens)
        return len(shared) + num_new

    def _needs(self, request: Request, num_tokens: int) -> tuple[list[int], int]:
        """Which of its pages (places in `page_ids`) must be copied before the next tokens, and how many are missing."""
        first = request.num_computed // self.page_size
        last = (request.num_computed + num_tokens - 1) // self.page_size
        held = range(first, min(last + 1, len(request.page_ids)))
        shared = [place for place in held if self._is_shared(request.page_ids[place])]
        return shared, max(0, last + 1 - len(request.page_ids))

    def publish(self, request: Request) -> None:
        """Name the request's full computed pages, so that others find them."""
        if not self._prefix_cache:
            return
        num_full = request.num_computed // self.page_size
        if len(request.page_hashes) < num_full:
            self._extend_hashes(request, request.num_computed)
        for i in range(request.num_published, num_full):
            self.pool.publish(request.page_ids[i], request.page_hashes[i])
        request.num_published = num_full

    def release(self, request: Request) -> None:
        """Give back all of a request's pages."""
        # From the end: the prefix cache drops its oldest pages first, and a chain is of no use without its start.
        for page_id in reversed(request.page_ids):
            self.pool.free(page_id)
        request.page_ids = []
        request.num_computed = 0
        request.num_published = 0

    def share(self, source: Request, target: Request, num_computed: int) -> None:
        """Let `target`, without pages, stand on the first `num_computed` tokens of `source`."""
        assert not target.page_ids
        assert num_computed <= source.num_computed
        for page_id in source.page_ids[: -(-num_computed // self.page_size)]:
            self.pool.share(page_id)
            target.page_ids.append(page_id)
        target.num_computed = num_computed
        target.page_hashes = source.page_hashes[: num_computed // self.page_size]
        target.num_published = num_computed // self.page_size

    def truncate(self, request: Request, num_computed: int) -> None:
        """Forget what lies beyond the first `num_computed` tokens."""
        keep = -(-num_computed // self.page_size)
        for page_id in reversed(request.page_ids[keep:]):
            self.pool.free(page_id)
        del request.page_ids[keep:]
        del request.page_hashes[num_computed // self.page_size :]
        request.num_computed = min(request.num_computed, num_computed)
        request.num_published = min(request.num_published, num_computed // self.page_size)

    def _is_shared(self, page_id: int) -> bool:
        return self.pool.refs(page_id) > 1 or self.pool.is_published(page_id)

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        root = chain_root(*self._root_facts, request.cache_salt, request.position_offset)
        extend_chain(root, request.page_hashes, request.tokens[:num_tokens], self.page_size)
