"""The KV cache's memory: K and V of every layer, in pages."""

from __future__ import annotations

import torch

from workers.models.spec import ModelSpec


class KVCache:
    """`k[layer]` is [num_pages, num_kv_heads, head_dim, page_size], `v[layer]` [num_pages, num_kv_heads, page_size,
    head_dim]: both lie as the products with queries and with weights read them."""

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        pages = (num_pages, spec.num_kv_heads)
        k_shape, v_shape = (*pages, spec.head_dim, page_size), (*pages, page_size, spec.head_dim)
        # Empty: memory that no page ever needs is never touched. What a page held before is blanked when it is handed
        # out, or, by the host kernels, never read.
        self.k = [torch.empty(k_shape, device=device, dtype=dtype) for _ in spec.layers]
        self.v = [torch.empty(v_shape, device=device, dtype=dtype) for _ in spec.layers]
        self.num_pages = num_pages
        self.page_size = page_size

    def copy_page(self, source: int, target: int) -> None:
        """Copy all layers of one page onto another."""
        for cache in (*self.k, *self.v):
            cache[target].copy_(cache[source])

    def clear_page(self, page_id: int) -> None:
        """Blank a page before a new owner: masked keys still take part in products, and 0 * NaN is NaN."""
        for cache in (*self.k, *self.v):
            cache[page_id].zero_()


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, K and V."""
    return 2 * len(spec.layers) * spec.num_kv_heads * page_size * spec.head_dim * dtype.itemsize
