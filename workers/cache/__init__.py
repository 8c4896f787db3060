"""The paged KV cache: pages, their tables, and the prefix cache over them."""
